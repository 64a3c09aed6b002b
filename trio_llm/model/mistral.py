"""Mistral, as a difference from Llama: a window on all layers, unless it is null."""

from __future__ import annotations

from trio_llm.model.kv_cache import AttentionSpec
from trio_llm.model.layers import attention_spec
from trio_llm.model.llama import Llama


class Mistral(Llama):
    """Each query sees the last `sliding_window` tokens, itself included; all of them where it is null (v0.2 on)."""

    def make_spec(self, layer: int) -> AttentionSpec:
        window = self.config.get_int("sliding_window") if self.config.has("sliding_window") else None
        return attention_spec(self.config, layer, window=window)
