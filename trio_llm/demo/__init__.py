"""The demo model that ships with trio-llm: a toy that answers, and its smaller draft. Importing this loads nothing.

`grammar` writes the corpus, `train` trains on it, `evaluate` asks the questions of `questions`.
"""

from __future__ import annotations

from pathlib import Path


def demo_model_path() -> Path:
    """Return the checkpoint directory of the demo model; its name is what the model answers to."""
    return Path(__file__).parent / "trio-llm-demo"


def draft_model_path() -> Path:
    """Return the checkpoint directory of the draft, a smaller model with the same tokenizer."""
    return Path(__file__).parent / "trio-llm-demo-draft"
