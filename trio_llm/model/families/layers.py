"""The layers that decoders are built from. Families combine them differently.

Attention is split among the ranks by heads, feed-forwards and experts by their width, embedding and head by tokens.

Letters: S tokens, H hidden size, Hq/Hkv heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable

import attrs
import torch
from torch import Tensor

from trio_llm.errors import CheckpointError
from trio_llm.model.checkpoint.weights import Weights
from trio_llm.model.config import ModelConfig
from trio_llm.model.ops import seam as ops
from trio_llm.model.paged.attention_batch import AttentionBatch
from trio_llm.model.paged.kv_cache import AttentionSpec, KVCache
from trio_llm.model.paged.rope import Rope
from trio_llm.model.parallel.group import Group

ACTIVATIONS: dict[str, ops.Activation] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
MAX_LAYERS = 1000
MAX_EXPERTS = 4096

# [S, H] to [S, H]; experts use the batch to skip padding tokens.
FeedForward = Callable[[Tensor | ops.AddNorm, AttentionBatch], Tensor]


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
    num_heads = config.get_int("num_attention_heads", maximum=MAX_LAYERS)
    num_kv_heads = config.get_int(kv_heads_key, num_heads, maximum=MAX_LAYERS)
    head_dim = config.get_int(head_dim_key, config.get_int("hidden_size") // num_heads, minimum=2)
    if num_heads % num_kv_heads:
        raise CheckpointError(
            f"{config.source}: {num_heads} attention heads are not a multiple of {num_kv_heads} KV heads"
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


def rank_spec(spec: AttentionSpec, group: Group) -> AttentionSpec:
    """Return the spec of a layer with only this rank's heads."""
    heads, kv_heads = group.heads(spec.num_heads, spec.num_kv_heads)
    return attrs.evolve(spec, num_heads=heads.length, num_kv_heads=kv_heads.length)


class Vocabulary:
    """The tokens of an embedding and of the head, split among the ranks."""

    def __init__(self, size: int, group: Group) -> None:
        self.span, self._size, self._group = group.share(size), size, group

    def embed(self, token_ids: Tensor, table: ops.Matrix, dtype: torch.dtype, parts: int = 1) -> Tensor:
        """Return the rows of token_ids [S]: [S, K], or [S, parts, K] if a token has several."""
        if self._group.size == 1:
            return ops.embedding(_rows(token_ids, parts), table, dtype)
        local = token_ids - self.span.first
        absent = (local < 0) | (local >= self.span.count)
        rows = ops.embedding(_rows(local.masked_fill(absent, 0), parts), table, dtype)
        return self._group.all_reduce(rows.masked_fill(absent.view(-1, *[1] * (rows.ndim - 1)), 0))

    def logits(self, hidden: Tensor, head: ops.Matrix, out: Tensor | None = None) -> Tensor:
        """Return [R, V] float32 for hidden [R, H], in `out` if given; on ranks other than 0, only their part."""
        if self._group.size == 1 and out is not None:
            return ops.logits(hidden, head, out)
        logits = self._group.gather(ops.linear(hidden, head))
        if self._group.rank:
            return logits
        logits = logits[:, : self._size]
        return logits.float() if out is None else out.copy_(logits)


def _rows(token_ids: Tensor, parts: int) -> Tensor:
    if parts == 1:
        return token_ids
    return token_ids[:, None] * parts + torch.arange(parts, device=token_ids.device)


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
            spec: With the heads of all ranks. If its kv_layer is another layer, this layer computes only q.
            qk_norm: RMS norm of q and k over D before the rotation.
            v_norm: RMS norm of the values, without weight.
            k_eq_v: There is no v_proj; values are the raw keys.
        """
        owns_kv = spec.kv_layer == layer
        self.group = weights.group
        q_size, kv_size = (heads.times(spec.head_dim) for heads in self.group.heads(spec.num_heads, spec.num_kv_heads))
        spec = rank_spec(spec, self.group)
        names = ["q_proj"] + (["k_proj"] + ([] if k_eq_v else ["v_proj"]) if owns_kv else [])
        sizes = [q_size] + [kv_size] * (len(names) - 1)
        self.qkv = weights.matrix(names, sizes, hidden_size, bias=qkv_bias)
        self.out = weights.matrix(["o_proj"], [hidden_size], q_size, bias=out_bias)
        self.qk_norm = None
        if qk_norm:
            # Filled in place: torch.cat on the meta device, used to check checkpoints, imports torch._dynamo, which
            # takes longer than the rest of loading a small model.
            of_q = weights.tensor("q_norm.weight", spec.head_dim)
            num_rows = spec.num_heads + (spec.num_kv_heads if owns_kv else 0)
            self.qk_norm = of_q.new_empty(num_rows, spec.head_dim, dtype=torch.float32)
            self.qk_norm[: spec.num_heads] = of_q
            if owns_kv:
                self.qk_norm[spec.num_heads :] = weights.tensor("k_norm.weight", spec.head_dim)
        self.spec, self.layer, self.rope, self.eps, self.v_norm = spec, layer, rope, eps, v_norm

    def __call__(self, hidden: Tensor | ops.AddNorm, batch: AttentionBatch, kv: KVCache) -> Tensor:
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
        return self.group.all_reduce(ops.linear(ops.paged_attention(q, batch, layer_kv, self.spec), self.out))


class GatedMLP:
    """down(act(gate(x)) * up(x)), gate and up computed by one fused matrix."""

    def __init__(
        self, weights: Weights, hidden_size: int, intermediate_size: int, kind: ops.Activation, *, bias: bool = False
    ) -> None:
        self.group = weights.group
        width = self.group.share(intermediate_size)
        self.gate_up = weights.matrix(["gate_proj", "up_proj"], [width] * 2, hidden_size, bias=bias)
        self.down = weights.matrix(["down_proj"], [hidden_size], width, bias=bias)
        self.kind: ops.Activation = kind

    def __call__(self, hidden: Tensor | ops.AddNorm, _: AttentionBatch) -> Tensor:
        return self.group.all_reduce(ops.linear(ops.gated_linear(hidden, self.gate_up, self.kind), self.down))


def make_experts(
    gate_up: ops.SingleMatrix, down: ops.SingleMatrix, num_experts: int, device: torch.device
) -> ops.Experts:
    """Combine expert weights with a counter of the tokens that they receive."""
    return ops.Experts(gate_up, down, torch.zeros(num_experts, dtype=torch.int64, device=device))


class SparseMLP:
    """The `top_k` of E gated feed-forwards for each token: a softmax over all, then the top ones renormalised."""

    def __init__(
        self,
        weights: Weights,
        parts: tuple[str, str, str],
        hidden_size: int,
        intermediate_size: int,
        kind: ops.Activation,
        *,
        num_experts: int,
        top_k: int,
    ) -> None:
        """Read the router and the experts; `parts` are the names of an expert's gate, up and down."""
        gate, up, down = parts
        self.group = weights.group
        width = self.group.share(intermediate_size)
        names = [f"experts.{index}." for index in range(num_experts)]
        self.router = weights.unquantized().matrix(["gate"], [num_experts], hidden_size)
        self.experts = make_experts(
            weights.experts(
                [(f"{name}{gate}.weight", f"{name}{up}.weight") for name in names], [width] * 2, hidden_size
            ),
            weights.experts([(f"{name}{down}.weight",) for name in names], [hidden_size], width),
            num_experts,
            weights.device,
        )
        self.top_k = top_k
        self.kind: ops.Activation = kind

    def __call__(self, hidden: Tensor | ops.AddNorm, batch: AttentionBatch) -> Tensor:
        """Map [S, H] to [S, H]."""
        hidden = ops.value(hidden)
        weights, ids = ops.route(ops.linear(hidden, self.router), self.top_k)
        return self.group.all_reduce(ops.moe(hidden, weights, batch.without_padding(ids), self.experts, self.kind))
