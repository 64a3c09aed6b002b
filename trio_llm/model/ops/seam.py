"""The seam between models and kernels: every operation that may have a faster implementation.

Layers call only these functions. The torch reference defines what any other implementation must compute; `dispatch`
chooses the one that runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from trio_llm.model.ops import torch_attention as attention_torch
from trio_llm.model.ops import torch_reference as ops_torch
from trio_llm.model.ops.dispatch import choose, choose_fused
from trio_llm.model.ops.matrices import (
    Activation,
    Blocks,
    Dense,
    Experts,
    Int8,
    Keeps,
    Matrix,
    Panels,
    SingleMatrix,
    Stacked,
    keeps_integers,
)
from trio_llm.model.paged.attention_batch import AttentionBatch
from trio_llm.model.paged.kv_cache import AttentionSpec, KVLayout, LayerKV
from trio_llm.model.paged.rope import Rope

__all__ = [
    "Activation",
    "AddNorm",
    "Blocks",
    "Dense",
    "Experts",
    "Int8",
    "Keeps",
    "Matrix",
    "Panels",
    "SingleMatrix",
    "Stacked",
    "act_and_mul",
    "add_rms_norm",
    "embedding",
    "gated_linear",
    "keeps_integers",
    "linear",
    "logits",
    "moe",
    "pack",
    "paged_attention",
    "prepare_decodes",
    "quantize_rows",
    "rms_norm",
    "route",
    "value",
    "write_kv",
]


@attrs.define(eq=False)
class AddNorm:
    """The norm of a sum that is not computed yet: the product that reads it may do it in the same launch.

    Attributes:
        x: [S, H].
        residual: [S, H], added to x; None where there is nothing to add.
        weight, eps: Of the norm.
    """

    x: Tensor
    residual: Tensor | None
    weight: Tensor
    eps: float
    _results: tuple[Tensor, Tensor] | None = attrs.field(default=None, init=False)
    _total: Tensor | None = attrs.field(default=None, init=False)

    @property
    def value(self) -> Tensor:
        """rms_norm(x + residual)."""
        return self._computed()[0]

    @property
    def total(self) -> Tensor:
        """X + residual."""
        return self._computed()[1] if self._total is None else self._total

    def linear(self, matrix: Matrix, kind: Activation | None = None) -> Tensor | None:
        """Return the product of `value` with a matrix, gated if there is a kind; None if it takes several launches."""
        if self._results is not None or isinstance(matrix, Stacked):
            return None
        kernels = choose_fused("normed_linear", self.x, self.residual, self.weight, matrix)
        if kernels is None:
            return None
        out, self._total = kernels.normed_linear(self.x, self.residual, self.weight, self.eps, matrix, kind)
        return out

    def _computed(self) -> tuple[Tensor, Tensor]:
        if self._results is None and self.residual is None:
            self._results = rms_norm(self.x, self.weight, self.eps), self.x
        elif self._results is None:
            assert self.residual is not None
            self._results = add_rms_norm(self.x, self.residual, self.weight, self.eps)
        return self._results


def value(x: Tensor | AddNorm) -> Tensor:
    """Return x [S, H], computed."""
    return x.value if isinstance(x, AddNorm) else x


def pack(matrix: Dense | Int8 | Blocks) -> SingleMatrix:
    """Return a matrix in the kernels' layout; the caller keeps only that."""
    kernels = choose("pack", matrix.weight)
    return kernels.pack(matrix) if kernels else matrix


def embedding(token_ids: Tensor, matrix: Matrix, dtype: torch.dtype) -> Tensor:
    """Return rows of the matrix in `dtype`, the model's: [..., K] for ids [...]."""
    return (choose("embedding", token_ids, matrix, dtype) or ops_torch).embedding(token_ids, matrix, dtype)


def linear(x: Tensor | AddNorm, matrix: Matrix) -> Tensor:
    """Return x [S, K] times the matrix's transpose, [S, N], plus its bias."""
    if isinstance(x, AddNorm):
        fused = x.linear(matrix)
        return linear(x.value, matrix) if fused is None else fused
    if isinstance(matrix, Stacked):
        return torch.cat([linear(x, part) for part in matrix.parts], dim=-1)
    return (choose("linear", x, matrix) or ops_torch).linear(x, matrix)


def gated_linear(x: Tensor | AddNorm, gate_up: Matrix, kind: Activation) -> Tensor:
    """Return act(gate) * up [S, I], the two products of x [S, K] with a matrix [2I, K], gate first."""
    if isinstance(x, AddNorm):
        fused = x.linear(gate_up, kind)
        return gated_linear(x.value, gate_up, kind) if fused is None else fused
    kernels = None if isinstance(gate_up, Stacked) else choose("gated_linear", x, gate_up)
    return kernels.gated_linear(x, gate_up, kind) if kernels else act_and_mul(linear(x, gate_up), kind)


def logits(hidden: Tensor, head: Matrix, out: Tensor) -> Tensor:
    """Return `linear` of hidden [R, H] as float32, in `out` [R, V]."""
    kernels = choose_fused("logits", hidden, head, out)
    return kernels.logits(hidden, head, out) if kernels else out.copy_(linear(hidden, head))


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Divide the last dimension by its root mean square (in float32), then scale it by `weight`."""
    return (choose("rms_norm", x) or ops_torch).rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (rms_norm(x + residual), x + residual)."""
    return (choose("add_rms_norm", x) or ops_torch).add_rms_norm(x, residual, weight, eps)


def act_and_mul(gate_up: Tensor, kind: Activation) -> Tensor:
    """Return act(gate) * up for gate_up [S, 2I], gate first."""
    return (choose("act_and_mul", gate_up) or ops_torch).act_and_mul(gate_up, kind)


def prepare_decodes(
    inputs: Tensor,
    tables: Sequence[Tensor],
    padding_row: int,
    layout: KVLayout,
    ropes: Sequence[Rope],
    max_context: int,
) -> AttentionBatch:
    """Build the batch of one token per row from tensors alone, so that it can be captured: see `ops_torch`."""
    implementation = choose("prepare_decodes", inputs) or ops_torch
    return implementation.prepare_decodes(inputs, tables, padding_row, layout, ropes, max_context)


def write_kv(
    qkv: Tensor,
    batch: AttentionBatch,
    kv: LayerKV,
    spec: AttentionSpec,
    rope: Rope,
    *,
    qk_norm: Tensor | None = None,
    v_norm: bool = False,
    eps: float = 0.0,
) -> Tensor:
    """Normalise and rotate q and k, write k and v into their slots, and return q: see `ops_torch.write_kv`."""
    implementation = choose("write_kv", qkv, kv) or ops_torch
    return implementation.write_kv(qkv, batch, kv, spec, rope, qk_norm=qk_norm, v_norm=v_norm, eps=eps)


def paged_attention(q: Tensor, batch: AttentionBatch, kv: LayerKV, spec: AttentionSpec) -> Tensor:
    """Attend every token to its row's cached keys and values: see `attention_torch.paged_attention`."""
    return (choose("paged_attention", q, batch, kv, spec) or attention_torch).paged_attention(q, batch, kv, spec)


def route(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Choose experts from logits [S, E]: weights and ids [S, top_k]; see `ops_torch.route`."""
    return (choose("route", logits, top_k) or ops_torch).route(logits, top_k)


def moe(x: Tensor, weights: Tensor, ids: Tensor, experts: Experts, kind: Activation) -> Tensor:
    """Run each token of x [S, H] through its experts and add up: see `ops_torch.moe`."""
    return (choose("moe", x, experts) or ops_torch).moe(x, weights, ids, experts, kind)


def quantize_rows(dense: Tensor, weight: Tensor, scale: Tensor) -> None:
    """Write dense [N, K] into weight [N, K] int8 and scale [N], one per output channel."""
    (choose("quantize_rows", dense) or ops_torch).quantize_rows(dense, weight, scale)
