"""Mistral, as a difference from Llama: a window on all layers, unless it is null."""

from __future__ import annotations

from trio_llm.model.families.layers import attention_spec
from trio_llm.model.families.llama import Llama
from trio_llm.model.paged.kv_cache import AttentionSpec


class Mistral(Llama):
    """Each query sees the last `sliding_window` tokens, itself included; all of them if it is null (since v0.2)."""

    def make_spec(self, layer: int) -> AttentionSpec:
        window = self.config.get_int("sliding_window") if self.config.has("sliding_window") else None
        return attention_spec(self.config, layer, window=window)
