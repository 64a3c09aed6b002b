"""Llama, and what most decoders after it share: pre-norm blocks of attention and a gated feed-forward.

A family that differs in a detail overrides the method that makes the part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trio_llm.model.checkpoint.weights import Weights
from trio_llm.model.config import ModelConfig
from trio_llm.model.families.layers import (
    ACTIVATIONS,
    MAX_LAYERS,
    Attention,
    FeedForward,
    GatedMLP,
    Vocabulary,
    attention_spec,
    rank_spec,
)
from trio_llm.model.ops import seam as ops
from trio_llm.model.paged.attention_batch import AttentionBatch
from trio_llm.model.paged.kv_cache import AttentionSpec, KVCache
from trio_llm.model.paged.rope import Rope, make_rope


class LlamaLayer:
    """norm, attention, add; norm, feed-forward, add. The last add is left to the next layer's norm."""

    def __init__(self, weights: Weights, hidden_size: int, eps: float, attention: Attention, mlp: FeedForward) -> None:
        self.input_norm = weights.tensor("input_layernorm.weight", hidden_size)
        self.post_norm = weights.tensor("post_attention_layernorm.weight", hidden_size)
        self.attention, self.mlp, self.eps = attention, mlp, eps

    def __call__(
        self, hidden: Tensor, residual: Tensor | None, batch: AttentionBatch, kv: KVCache
    ) -> tuple[Tensor, Tensor]:
        """Return this layer's output and the residual to add it to; the first layer has none."""
        before = ops.AddNorm(hidden, residual, self.input_norm, self.eps)
        attended = self.attention(before, batch, kv)
        after = ops.AddNorm(attended, before.total, self.post_norm, self.eps)
        return self.mlp(after, batch), after.total


class Llama:
    """A Llama decoder. `config` is the text config; letters as in layers.py."""

    tied_by_default = False

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.config = config
        self.hidden_size = config.get_int("hidden_size")
        self.vocab_size = config.get_int("vocab_size")
        self.num_layers = config.get_int("num_hidden_layers", maximum=MAX_LAYERS)
        self.eps = config.get_float("rms_norm_eps", 1e-6)
        self.experts: list[ops.Experts] = []
        self.read_config()
        self.whole_specs = tuple(self.make_spec(layer) for layer in range(self.num_layers))
        self.specs = tuple(rank_spec(spec, weights.group) for spec in self.whole_specs)
        self.vocabulary = Vocabulary(self.vocab_size, weights.group)
        self.read_weights(weights)

    def read_config(self) -> None:
        """Read the settings that the family's specs need."""

    def read_weights(self, weights: Weights) -> None:
        tied = self.config.get_bool("tie_word_embeddings", self.tied_by_default)
        self.ropes = self.make_ropes(weights.device)
        self.embed = weights.table("model.embed_tokens.weight", self.vocabulary.span, self.hidden_size)
        if tied:  # before the layers are there, while two of it fit well
            self.embed = ops.pack(self.embed)
        self.layers = [self.make_layer(i, weights.at(f"model.layers.{i}")) for i in range(self.num_layers)]
        self.norm = weights.tensor("model.norm.weight", self.hidden_size)
        self.head = self.embed if tied else weights.matrix(["lm_head"], [self.vocabulary.span], self.hidden_size)

    def make_ropes(self, device: torch.device) -> Sequence[Rope]:
        """Return each layer's rope; layers with the same rotation share the object."""
        return [make_rope(self.config, self.specs[0].head_dim).to(device)] * self.num_layers

    def is_ignored(self, name: str) -> bool:
        """Return whether a checkpoint may hold this tensor although the model does not read it.

        Old checkpoints store the rope frequencies; one with tied embeddings may store the head too.
        """
        return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and self.head is self.embed)

    def make_spec(self, layer: int) -> AttentionSpec:
        return attention_spec(self.config, layer)

    def make_layer(self, layer: int, weights: Weights) -> Callable[..., Any]:
        attention = self.make_attention(layer, weights.at("self_attn"))
        return LlamaLayer(weights, self.hidden_size, self.eps, attention, self.make_mlp(weights))

    def make_attention(self, layer: int, weights: Weights, **options: bool) -> Attention:
        """Read one layer's attention; `options` are Attention's, biases as the config says unless given."""
        bias = self.config.get_bool("attention_bias", False)
        options = {"qkv_bias": bias, "out_bias": bias, **options}
        return Attention(
            weights, self.whole_specs[layer], layer, self.ropes[layer], self.hidden_size, eps=self.eps, **options
        )

    def make_mlp(self, weights: Weights) -> FeedForward:
        kind = self.config.choice("hidden_act", ACTIVATIONS, "silu")
        bias = self.config.get_bool("mlp_bias", False)
        return GatedMLP(weights.at("mlp"), self.hidden_size, self.config.get_int("intermediate_size"), kind, bias=bias)

    def forward(self, batch: AttentionBatch, kv: KVCache) -> Tensor:
        """Run the layers; write keys and values of all S tokens; return [S, H], after the final norm."""
        hidden = self.vocabulary.embed(batch.token_ids, self.embed, self.norm.dtype)
        residual = None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual, batch, kv)
        return ops.AddNorm(hidden, residual, self.norm, self.eps).value

    def expert_load(self) -> Tensor | None:
        """Return [L, E] int64, tokens each expert of each sparse layer has received so far; None without experts."""
        return torch.stack([experts.load for experts in self.experts]) if self.experts else None

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Return [R, V] float32 for hidden rows [R, H], in `out` if given; on ranks other than 0, only their part."""
        return self.vocabulary.logits(hidden, self.head, out)
