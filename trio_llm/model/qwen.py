"""Qwen2, Qwen2.5 and Qwen3, as differences from Llama."""

from __future__ import annotations

from trio_llm.errors import CheckpointError
from trio_llm.model.config import ModelConfig
from trio_llm.model.kv_cache import AttentionSpec
from trio_llm.model.layers import Attention, attention_spec
from trio_llm.model.llama import Llama
from trio_llm.model.weights import Weights


def layer_window(config: ModelConfig, layer: int) -> int | None:
    """Return the layer's window: later layers have one where the config says so."""
    if not config.get_bool("use_sliding_window", False) or not config.has("sliding_window"):
        return None
    if config.has("layer_types"):
        types = config.strings("layer_types", config.get_int("num_hidden_layers"))
        if types[layer] not in ("full_attention", "sliding_attention"):
            raise CheckpointError(f"{config.source}: layer_types: unknown {types[layer]!r}")
        sliding = types[layer] == "sliding_attention"
    else:
        sliding = layer >= config.get_int("max_window_layers", least=0)
    return config.get_int("sliding_window") if sliding else None


class Qwen2(Llama):
    """Biases on q, k and v, never on o; a window on later layers where the config says so."""

    def make_spec(self, layer: int) -> AttentionSpec:
        return attention_spec(self.config, layer, window=layer_window(self.config, layer))

    def make_attention(self, layer: int, weights: Weights, **options: bool) -> Attention:
        return super().make_attention(layer, weights, **{"qkv_bias": True, "out_bias": False, **options})


class Qwen3(Llama):
    """Windows as in Qwen2; q and k are normalised before the rotation; biases only where the config says so."""

    def make_spec(self, layer: int) -> AttentionSpec:
        return attention_spec(self.config, layer, window=layer_window(self.config, layer))

    def make_attention(self, layer: int, weights: Weights, **options: bool) -> Attention:
        return super().make_attention(layer, weights, qk_norm=True, **options)
