"""Qwen2, Qwen2.5, Qwen3 and Qwen3-MoE, as differences from Llama."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trio_llm.errors import CheckpointError, UnsupportedError
from trio_llm.model.checkpoint.weights import Weights
from trio_llm.model.config import ModelConfig
from trio_llm.model.families.layers import (
    ACTIVATIONS,
    MAX_EXPERTS,
    Attention,
    FeedForward,
    SparseMLP,
    attention_spec,
)
from trio_llm.model.families.llama import Llama, LlamaLayer
from trio_llm.model.paged.kv_cache import AttentionSpec


def layer_window(config: ModelConfig, layer: int) -> int | None:
    """Return the layer's window: later layers have one if the config says so."""
    if not config.get_bool("use_sliding_window", False) or not config.has("sliding_window"):
        return None
    if config.has("layer_types"):
        types = config.strings("layer_types", config.get_int("num_hidden_layers"))
        if types[layer] not in ("full_attention", "sliding_attention"):
            raise CheckpointError(f"{config.source}: layer_types: unknown {types[layer]!r}")
        sliding = types[layer] == "sliding_attention"
    else:
        sliding = layer >= config.get_int("max_window_layers", minimum=0)
    return config.get_int("sliding_window") if sliding else None


class Qwen2(Llama):
    """Biases on q, k and v, never on o; a window on later layers if the config says so."""

    def make_spec(self, layer: int) -> AttentionSpec:
        return attention_spec(self.config, layer, window=layer_window(self.config, layer))

    def make_attention(self, layer: int, weights: Weights, **options: bool) -> Attention:
        return super().make_attention(layer, weights, **{"qkv_bias": True, "out_bias": False, **options})


class Qwen3(Llama):
    """Windows as in Qwen2; q and k are normalised before the rotation; biases only if the config says so."""

    def make_spec(self, layer: int) -> AttentionSpec:
        return attention_spec(self.config, layer, window=layer_window(self.config, layer))

    def make_attention(self, layer: int, weights: Weights, **options: bool) -> Attention:
        return super().make_attention(layer, weights, qk_norm=True, **options)


class Qwen3Moe(Qwen3):
    """Qwen3 with experts in place of the feed-forward, in every `decoder_sparse_step`-th layer."""

    def read_config(self) -> None:
        super().read_config()
        if not self.config.get_bool("norm_topk_prob", False):
            raise UnsupportedError(f"{self.config.source}: norm_topk_prob = false is not supported")
        key = "num_experts" if self.config.has("num_experts") else "num_local_experts"  # transformers 5 renamed it
        self.num_experts = self.config.get_int(key, maximum=MAX_EXPERTS)
        step = self.config.get_int("decoder_sparse_step", 1)
        dense = self.config.token_ids("mlp_only_layers")
        self.sparse_layers = {
            layer for layer in range(self.num_layers) if layer not in dense and (layer + 1) % step == 0
        }

    def make_layer(self, layer: int, weights: Weights) -> Callable[..., Any]:
        attention = self.make_attention(layer, weights.at("self_attn"))
        mlp = self.make_sparse_mlp(weights.at("mlp")) if layer in self.sparse_layers else self.make_mlp(weights)
        return LlamaLayer(weights, self.hidden_size, self.eps, attention, mlp)

    def make_sparse_mlp(self, weights: Weights) -> FeedForward:
        mlp = SparseMLP(
            weights,
            ("gate_proj", "up_proj", "down_proj"),
            self.hidden_size,
            self.config.get_int("moe_intermediate_size"),
            self.config.choice("hidden_act", ACTIVATIONS, "silu"),
            num_experts=self.num_experts,
            top_k=self.config.get_int("num_experts_per_tok", maximum=self.num_experts),
        )
        self.experts.append(mlp.experts)
        return mlp
