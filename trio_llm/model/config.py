"""config.json as typed accessors that name the key they miss."""

from __future__ import annotations


class ModelConfig:
    """A Hugging Face config.json (the text part of a multimodal one)."""
