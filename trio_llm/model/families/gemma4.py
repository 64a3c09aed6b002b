"""Gemma 4, the text model: hybrid attention, shared KV, per-layer embeddings, experts next to a dense feed-forward.

Letters: S tokens, H hidden size, L layers, P per-layer embedding size, E experts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trio_llm.errors import CheckpointError, UnsupportedError
from trio_llm.model.checkpoint.weights import Weights
from trio_llm.model.config import ModelConfig
from trio_llm.model.families.layers import (
    ACTIVATIONS,
    MAX_EXPERTS,
    MAX_LAYERS,
    Attention,
    GatedMLP,
    Vocabulary,
    attention_spec,
    make_experts,
)
from trio_llm.model.families.llama import Llama
from trio_llm.model.ops import seam as ops
from trio_llm.model.paged.attention_batch import AttentionBatch
from trio_llm.model.paged.kv_cache import AttentionSpec, KVCache
from trio_llm.model.paged.rope import Rope, make_rope
from trio_llm.model.parallel.span import Span

DEFAULT_GLOBAL_HEAD_DIM = 512
SHARED_LAYER_LEFTOVER = re.compile(r"model\.layers\.(\d+)\.self_attn\.(k_proj|v_proj|k_norm)\.")


def layer_types(config: ModelConfig) -> list[str]:
    """Return each layer's attention type; the last one is full whatever the list says."""
    num_layers = config.get_int("num_hidden_layers", maximum=MAX_LAYERS)
    if config.has("layer_types"):
        types = list(config.strings("layer_types", num_layers))
    else:
        types = ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(num_layers)]
    unknown = set(types) - {"full_attention", "sliding_attention"}
    if unknown:
        raise CheckpointError(f"{config.source}: layer_types: unknown {sorted(unknown)}")
    return [*types[:-1], "full_attention"]


class Router:
    """Chooses experts from the raw residual."""

    def __init__(self, weights: Weights, hidden_size: int, num_experts: int, top_k: int, eps: float) -> None:
        self.proj = weights.unquantized().matrix(["proj"], [num_experts], hidden_size)
        self.scale = weights.tensor("scale", hidden_size)
        self.expert_scale = weights.tensor("per_expert_scale", num_experts)
        self.factor, self.top_k, self.eps = hidden_size**-0.5, top_k, eps

    def __call__(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights and ids, [S, top_k]."""
        logits = ops.linear(ops.rms_norm(hidden, None, self.eps) * self.scale * self.factor, self.proj)
        weights, ids = ops.route(logits, self.top_k)
        return weights * self.expert_scale[ids], ids


class PerLayerInput:
    """Mixes the layer's own embedding of each token into the residual."""

    def __init__(self, weights: Weights, hidden_size: int, size: int, kind: ops.Activation, eps: float) -> None:
        self.gate = weights.matrix(["per_layer_input_gate"], [size], hidden_size)
        self.projection = weights.matrix(["per_layer_projection"], [hidden_size], size)
        self.norm = weights.tensor("post_per_layer_input_norm.weight", hidden_size)
        self.kind: ops.Activation = kind
        self.eps = eps

    def __call__(self, hidden: Tensor, own: Tensor) -> Tensor:
        """Return what to add to hidden [S, H], from this layer's embeddings [S, P]."""
        gated = ops.act_and_mul(torch.cat((ops.linear(hidden, self.gate), own), dim=-1), self.kind)
        return ops.rms_norm(ops.linear(gated, self.projection), self.norm, self.eps)


class Gemma4Layer:
    """Attention and feed-forward, each with a norm before and after it inside the residual branch."""

    def __init__(self, model: Gemma4, layer: int, weights: Weights) -> None:
        hidden, self.eps = model.hidden_size, model.eps
        self.kind: ops.Activation = model.kind
        self.attention = model.make_attention(layer, weights.at("self_attn"))
        self.mlp = GatedMLP(weights.at("mlp"), hidden, model.intermediate_size(layer), self.kind)
        self.input_norm = weights.tensor("input_layernorm.weight", hidden)
        self.post_attention_norm = weights.tensor("post_attention_layernorm.weight", hidden)
        self.pre_mlp_norm = weights.tensor("pre_feedforward_layernorm.weight", hidden)
        self.post_mlp_norm = weights.tensor("post_feedforward_layernorm.weight", hidden)
        self.scalar = weights.tensor("layer_scalar", 1)
        self.per_layer_input = None
        if model.per_layer_size:
            self.per_layer_input = PerLayerInput(weights, hidden, model.per_layer_size, self.kind, self.eps)
        self.router = None
        if model.config.get_bool("enable_moe_block", False):
            self._read_experts(model.config, weights, hidden)
            model.experts.append(self.experts)

    def _read_experts(self, config: ModelConfig, weights: Weights, hidden: int) -> None:
        num_experts = config.get_int("num_experts", maximum=MAX_EXPERTS)
        intermediate_size = config.get_int("moe_intermediate_size")
        self.group, width = weights.group, weights.group.share(intermediate_size)
        top_k = config.get_int("top_k_experts", maximum=num_experts)
        self.router = Router(weights.at("router"), hidden, num_experts, top_k, self.eps)
        gate, up = (width.within(2 * intermediate_size, offset) for offset in (0, intermediate_size))
        gate_up = weights.stacked_experts("experts.gate_up_proj", num_experts, [gate, up], hidden)
        down = weights.stacked_experts("experts.down_proj", num_experts, [Span.whole(hidden)], width)
        self.experts = make_experts(gate_up, down, num_experts, weights.device)
        self.post_dense_norm = weights.tensor("post_feedforward_layernorm_1.weight", hidden)
        self.post_experts_norm = weights.tensor("post_feedforward_layernorm_2.weight", hidden)
        self.pre_experts_norm = weights.tensor("pre_feedforward_layernorm_2.weight", hidden)

    def __call__(self, hidden: Tensor, own: Tensor | None, batch: AttentionBatch, kv: KVCache) -> Tensor:
        """Map [S, H] to [S, H]; `own` [S, P] are this layer's embeddings."""
        attended = self.attention(ops.rms_norm(hidden, self.input_norm, self.eps), batch, kv)
        hidden = hidden + ops.rms_norm(attended, self.post_attention_norm, self.eps)
        out = self.mlp(ops.rms_norm(hidden, self.pre_mlp_norm, self.eps), batch)
        if self.router is not None:
            chosen = ops.rms_norm(hidden, self.pre_experts_norm, self.eps)
            weights, ids = self.router(hidden)
            chosen = ops.moe(chosen, weights, batch.without_padding(ids), self.experts, self.kind)
            chosen = self.group.all_reduce(chosen)
            out = ops.rms_norm(out, self.post_dense_norm, self.eps)
            out = out + ops.rms_norm(chosen, self.post_experts_norm, self.eps)
        hidden = hidden + ops.rms_norm(out, self.post_mlp_norm, self.eps)
        if self.per_layer_input is not None and own is not None:
            hidden = hidden + self.per_layer_input(hidden, own)
        return hidden * self.scalar


class Gemma4(Llama):
    """The text model of every size: E2B, E4B, 26B-A4B, 31B."""

    tied_by_default = True

    def read_config(self) -> None:
        config = self.config
        if config.has("use_bidirectional_attention") and config.get_str("use_bidirectional_attention") == "all":
            raise UnsupportedError(f"{config.source}: use_bidirectional_attention = 'all' is not supported")
        self.types = layer_types(config)
        self.num_owners = self.num_layers - config.get_int(
            "num_kv_shared_layers", 0, minimum=0, maximum=self.num_layers - 1
        )
        self.kind: ops.Activation = config.choice("hidden_activation", ACTIVATIONS, "gelu_pytorch_tanh")
        self.softcap = config.get_float("final_logit_softcapping") if config.has("final_logit_softcapping") else None
        self.per_layer_size = config.get_int("hidden_size_per_layer_input", 0, minimum=0)

    def read_weights(self, weights: Weights) -> None:
        super().read_weights(weights)
        # rounded to the model's dtype, as in the reference
        self.embed_scale = torch.tensor(self.hidden_size**0.5, dtype=weights.dtype, device=weights.device)
        if self.per_layer_size:
            size = self.num_layers * self.per_layer_size
            # every token is looked up: a smaller table would be read out of bounds
            rows = self.config.get_int("vocab_size_per_layer_input", self.vocab_size, minimum=self.vocab_size)
            self.per_layer_vocabulary = Vocabulary(rows, weights.group)
            self.per_layer_table = weights.table(
                "model.embed_tokens_per_layer.weight", self.per_layer_vocabulary.span, size, self.num_layers
            )
            self.per_layer_projection = weights.matrix(["model.per_layer_model_projection"], [size], self.hidden_size)
            self.per_layer_norm = weights.tensor("model.per_layer_projection_norm.weight", self.per_layer_size)
            self.per_layer_scale = torch.tensor(self.per_layer_size**0.5, dtype=weights.dtype, device=weights.device)

    def is_ignored(self, name: str) -> bool:
        """Allow the unused k and v weights that checkpoints store for layers with shared KV."""
        leftover = SHARED_LAYER_LEFTOVER.match(name)
        return super().is_ignored(name) or (leftover is not None and int(leftover[1]) >= self.num_owners)

    def make_ropes(self, device: torch.device) -> Sequence[Rope]:
        head_dims = {kind: spec.head_dim for kind, spec in zip(self.types, self.specs, strict=True)}
        ropes = {kind: make_rope(self.config, dim, kind).to(device) for kind, dim in head_dims.items()}
        return [ropes[kind] for kind in self.types]

    def make_spec(self, layer: int) -> AttentionSpec:
        config, kind = self.config, self.types[layer]
        owners = [i for i in range(self.num_owners) if self.types[i] == kind]
        if layer >= self.num_owners and not owners:
            raise CheckpointError(f"{config.source}: num_kv_shared_layers leaves no {kind} layer to share")
        return attention_spec(
            self.layer_config(layer),
            layer,
            scale=1.0,
            window=config.get_int("sliding_window") if kind == "sliding_attention" else None,
            kv_layer=layer if layer < self.num_owners else owners[-1],
        )

    def layer_config(self, layer: int) -> ModelConfig:
        """Return the config with this layer's overrides.

        Full-attention layers have their own head size, and their own KV heads if k equals v. transformers 5 writes
        these as `per_layer_config`, published checkpoints as `global_head_dim` and `num_global_key_value_heads`.
        """
        config = self.config
        differing: dict[str, Any] = {}
        if config.has("per_layer_config"):
            layers = config.section("per_layer_config")
            differing.update(layers.section(str(layer)).values if layers.has(str(layer)) else {})
        elif self.types[layer] == "full_attention":
            differing["head_dim"] = config.get_int("global_head_dim", DEFAULT_GLOBAL_HEAD_DIM)
            if self.is_k_eq_v(layer) and config.has("num_global_key_value_heads"):
                differing["num_key_value_heads"] = config.get_int("num_global_key_value_heads")
        return ModelConfig({**config.values, **differing}, config.source)

    def is_k_eq_v(self, layer: int) -> bool:
        return self.config.get_bool("attention_k_eq_v", False) and self.types[layer] == "full_attention"

    def make_layer(self, layer: int, weights: Weights) -> Callable[..., Tensor]:
        return Gemma4Layer(self, layer, weights)

    def make_attention(self, layer: int, weights: Weights, **options: bool) -> Attention:
        norms = {"qk_norm": True, "v_norm": True, "k_eq_v": self.is_k_eq_v(layer)}
        return super().make_attention(layer, weights, **norms, **options)

    def intermediate_size(self, layer: int) -> int:
        wide = layer >= self.num_owners and self.config.get_bool("use_double_wide_mlp", False)
        return self.config.get_int("intermediate_size") * (2 if wide else 1)

    def forward(self, batch: AttentionBatch, kv: KVCache) -> Tensor:
        """Run the layers; write keys and values of all S tokens; return [S, H], after the final norm."""
        hidden = self.vocabulary.embed(batch.token_ids, self.embed, self.norm.dtype) * self.embed_scale
        own = self.per_layer_embeddings(batch.token_ids, hidden) if self.per_layer_size else None
        for i, layer in enumerate(self.layers):
            hidden = layer(hidden, None if own is None else own[:, i], batch, kv)
        return ops.rms_norm(hidden, self.norm, self.eps)

    def per_layer_embeddings(self, token_ids: Tensor, hidden: Tensor) -> Tensor:
        """Return [S, L, P]: each layer's own embedding of the token, plus a projection of its main embedding."""
        from_token = self.per_layer_vocabulary.embed(token_ids, self.per_layer_table, self.norm.dtype, self.num_layers)
        from_token = from_token * self.per_layer_scale
        projected = ops.linear(hidden, self.per_layer_projection) * self.hidden_size**-0.5
        projected = ops.rms_norm(projected.view(from_token.shape), self.per_layer_norm, self.eps)
        return (projected + from_token) * 2**-0.5

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        logits = super().logits(hidden, out)
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)
