"""The parts that decoders are made of. Families differ in how they put them together.

Letters: S tokens, H hidden size, Hq/Hkv heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trio_llm.errors import CheckpointError
from trio_llm.model import ops
from trio_llm.model.attention import AttentionBatch
from trio_llm.model.config import ModelConfig
from trio_llm.model.kv_cache import AttentionSpec, KVCache
from trio_llm.model.rope import Rope
from trio_llm.model.weights import Weights

ACTIVATIONS: dict[str, ops.Activation] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
MAX_LAYERS = 1000
MAX_EXPERTS = 4096

# [S, H] to [S, H]; experts need to know which of the batch's tokens are real.
FeedForward = Callable[[Tensor, AttentionBatch], Tensor]


def attention_spec(
    config: ModelConfig,
    layer: int,
    *,
    window: int | None = None,
    scale: float | None = None,
    head_dim_key: str = "head_dim",
    kv_heads_key: str = "num_key_value_heads",
    kv_layer: int | None = None,
) -> AttentionSpec:
    """Read head counts and sizes from the config and check that they fit together."""
    num_heads = config.get_int("num_attention_heads", most=MAX_LAYERS)
    num_kv_heads = config.get_int(kv_heads_key, num_heads, most=MAX_LAYERS)
    head_dim = config.get_int(head_dim_key, config.get_int("hidden_size") // num_heads, least=2)
    if num_heads % num_kv_heads:
        raise CheckpointError(
            f"{config.source}: {num_heads} attention heads are no multiple of {num_kv_heads} KV heads"
        )
    if head_dim % 2:
        raise CheckpointError(f"{config.source}: {head_dim_key} = {head_dim}: must be even to be rotated")
    return AttentionSpec(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5 if scale is None else scale,
        kv_layer=layer if kv_layer is None else kv_layer,
        window=window,
    )


class Attention:
    """Self-attention over the paged cache, q, k and v computed by one fused matrix."""

    def __init__(
        self,
        weights: Weights,
        spec: AttentionSpec,
        layer: int,
        rope: Rope,
        hidden_size: int,
        *,
        eps: float,
        qkv_bias: bool = False,
        out_bias: bool = False,
        qk_norm: bool = False,
        v_norm: bool = False,
        k_eq_v: bool = False,
    ) -> None:
        """Read the layer's weights.

        Args:
            spec: A spec whose kv_layer is another layer leaves only q to this one.
            qk_norm: q and k pass an RMS norm over D before the rotation.
            v_norm: Values pass an RMS norm without weight.
            k_eq_v: There is no v_proj; values are the raw keys.
        """
        owns_kv = spec.kv_layer == layer
        q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        names = ["q_proj"] + (["k_proj"] + ([] if k_eq_v else ["v_proj"]) if owns_kv else [])
        sizes = [q_size] + [kv_size] * (len(names) - 1)
        self.qkv = weights.matrix(names, sizes, hidden_size, bias=qkv_bias)
        self.out = weights.matrix(["o_proj"], [hidden_size], q_size, bias=out_bias)
        self.qk_norm = None
        if qk_norm:
            # Filled in place: torch.cat on the meta device, where checkpoints are checked, imports torch._dynamo,
            # which takes longer than everything else about loading a small model.
            of_q = weights.tensor("q_norm.weight", spec.head_dim)
            num_rows = spec.num_heads + (spec.num_kv_heads if owns_kv else 0)
            self.qk_norm = of_q.new_empty(num_rows, spec.head_dim, dtype=torch.float32)
            self.qk_norm[: spec.num_heads] = of_q
            if owns_kv:
                self.qk_norm[spec.num_heads :] = weights.tensor("k_norm.weight", spec.head_dim)
        self.spec, self.layer, self.rope, self.eps, self.v_norm = spec, layer, rope, eps, v_norm

    def __call__(self, hidden: Tensor, batch: AttentionBatch, kv: KVCache) -> Tensor:
        """Map [S, H] to [S, H]."""
        layer_kv = kv.layers[self.layer]
        q = ops.write_kv(
            ops.linear(hidden, self.qkv),
            batch,
            layer_kv,
            self.spec,
            self.rope,
            qk_norm=self.qk_norm,
            v_norm=self.v_norm,
            eps=self.eps,
        )
        return ops.linear(ops.paged_attention(q, batch, layer_kv, self.spec), self.out)


class GatedMLP:
    """down(act(gate(x)) * up(x)), gate and up computed by one fused matrix."""

    def __init__(
        self, weights: Weights, hidden_size: int, intermediate_size: int, kind: ops.Activation, *, bias: bool = False
    ) -> None:
        self.gate_up = weights.matrix(["gate_proj", "up_proj"], [intermediate_size] * 2, hidden_size, bias=bias)
        self.down = weights.matrix(["down_proj"], [hidden_size], intermediate_size, bias=bias)
        self.kind: ops.Activation = kind

    def __call__(self, hidden: Tensor, _: AttentionBatch) -> Tensor:
        return ops.linear(ops.gated_linear(hidden, self.gate_up, self.kind), self.down)


def make_experts(gate_up: ops.Matrix, down: ops.Matrix, num_experts: int, device: torch.device) -> ops.Experts:
    """Put expert weights together with a count of the tokens they get."""
    return ops.Experts(gate_up, down, torch.zeros(num_experts, dtype=torch.int64, device=device))
