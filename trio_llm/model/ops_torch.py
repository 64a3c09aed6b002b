"""Every operation of the models in plain torch: the reference that kernels are tested against, and the CPU path.

Letters: S tokens, Hq/Hkv heads, D head size, N outputs, K inputs, E experts, I expert width, H hidden size.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from trio_llm.model.attention import AttentionBatch
from trio_llm.model.capturing import asks_host
from trio_llm.model.kv_cache import AttentionSpec, LayerKV
from trio_llm.model.rope import Rope

Activation = Literal["silu", "gelu_tanh"]
INT8_MAX = 127
INT8_KERNEL_MULTIPLE = 32
QUANTIZE_ELEMENTS = 16 * 1024 * 1024  # quantised at a time: 64 MiB of float32 (guessed)
EXPAND_ELEMENTS = 4 * 1024 * 1024  # weights expanded at a time: 16 MiB of float32 (guessed)
# From so many rows on expanding weights costs less than it saves. Measured with 6144 x 1024 on a core without bfloat16
# arithmetic, in ms, as they are or expanded: 16 rows 10 or 12, 32 rows 18 or 14; int8 32 rows 10 or 14, 128 51 or 25.
EXPAND_ROWS = 24
EXPAND_INT8_ROWS = 48


@attrs.frozen(eq=False)
class Dense:
    """A weight in the model's dtype: weight [N, K] (experts [E, N, K]), bias [N] or None."""

    weight: Tensor
    bias: Tensor | None = None


@attrs.frozen(eq=False)
class Int8:
    """A weight of one scale per output channel: weight [N, K] int8 * scale [N] (experts [E, N, K] and [E, N])."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None = None


Matrix = Dense | Int8


@attrs.frozen(eq=False)
class Experts:
    """The feed-forward experts of one layer.

    Attributes:
        gate_up: [E, 2I, H], gate first.
        down: [E, H, I].
        load: [E] int64, tokens each expert has received so far.
    """

    gate_up: Matrix
    down: Matrix
    load: Tensor


def linear(x: Tensor, matrix: Matrix) -> Tensor:
    """Return x [S, K] times the matrix's transpose, [S, N], plus its bias."""
    if isinstance(matrix, Dense):
        if len(x) >= EXPAND_ROWS and x.device.type == "cpu" and _gemm_dtype(x.dtype) != x.dtype:
            out = _expanded_linear(x, matrix.weight)
            return (out if matrix.bias is None else out + matrix.bias).to(x.dtype)
        return F.linear(x, matrix.weight, matrix.bias)
    out = _int8_linear(x, matrix.weight, matrix.scale)
    return out if matrix.bias is None else out + matrix.bias


def _int8_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    # torch's kernel reads weights as int8; its float32 path is 2 to 80 times slower than expanding them, and in
    # bfloat16 it reads out of bounds where K is no multiple of 16 (measured, torch 2.13)
    fits = x.dtype != torch.float32 and x.device.type == "cpu" and weight.shape[1] % INT8_KERNEL_MULTIPLE == 0
    if fits and len(x) < EXPAND_INT8_ROWS:
        return torch.ops.aten._weight_int8pack_mm(x.contiguous(), weight, scale)
    wider = x.float() if x.dtype == torch.float16 else x  # in which sums of whole numbers overflow
    return (_expanded_linear(wider, weight) * scale).to(x.dtype)


def _expanded_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply in the dtype the processor is fastest in, expanding the weights a few rows at a time."""
    x = x.to(_gemm_dtype(x.dtype) if x.device.type == "cpu" else x.dtype)
    rows = max(1, EXPAND_ELEMENTS // weight.shape[1])
    return torch.cat([F.linear(x, part.to(x.dtype)) for part in weight.split(rows)], dim=-1)


def quantize_rows(dense: Tensor, weight: Tensor, scale: Tensor) -> None:
    """Write dense [N, K] into weight [N, K] int8 and scale [N].

    The scale is rounded to its own dtype first: rounding it later would bend a whole channel by up to
    0.4 % in bfloat16.
    """
    rows = max(1, QUANTIZE_ELEMENTS // dense.shape[1])
    for source, target, factor in zip(dense.split(rows), weight.split(rows), scale.split(rows), strict=True):
        values = source.float()
        factor.copy_((values.abs().amax(1) / INT8_MAX).clamp_min(torch.finfo(scale.dtype).tiny))
        target.copy_((values / factor.float()[:, None]).round().clamp(-INT8_MAX, INT8_MAX))


@cache
def _gemm_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype for large products on this processor: float32 where it has no arithmetic in `dtype`."""
    features = {torch.bfloat16: ("avx512_bf16", "amx_bf16"), torch.float16: ("avx512_fp16", "amx_fp16")}
    has = torch.cpu.get_capabilities()
    missing = has.get("architecture") == "x86_64" and not any(has.get(name) for name in features.get(dtype, ()))
    return torch.float32 if missing else dtype


def embedding(token_ids: Tensor, matrix: Matrix) -> Tensor:
    """Return rows of the matrix in the model's dtype, [..., K] for ids [...]."""
    rows = F.embedding(token_ids, matrix.weight)
    return rows if isinstance(matrix, Dense) else rows * matrix.scale[token_ids][..., None]


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Divide the last dimension by its root mean square (in float32), then scale it by `weight`."""
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (rms_norm(x + residual), x + residual)."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def act_and_mul(gate_up: Tensor, kind: Activation) -> Tensor:
    """Return act(gate) * up for gate_up [S, 2I], gate first."""
    gate, up = gate_up.chunk(2, dim=-1)
    gate = F.silu(gate) if kind == "silu" else F.gelu(gate, approximate="tanh")
    return gate.mul_(up)


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
    """Normalise and rotate q and k, write k and v into their slots, and return q.

    Args:
        qkv: [S, (Hq + 2 Hkv) * D]; without the last Hkv heads values are the raw keys; of Hq heads only,
            nothing is written (the layer reads another one's cache).
        qk_norm: Weights of an RMS norm over D before the rotation, one row per head of q and k, or None.
        v_norm: Values are RMS-normalised without weight.
    Returns:
        q [S, Hq, D].
    """
    heads = qkv.view(len(qkv), -1, spec.head_dim)
    writes = heads.shape[1] > spec.num_heads
    rotated_heads = spec.num_heads + (spec.num_kv_heads if writes else 0)
    qk = heads[:, :rotated_heads].float()
    if qk_norm is not None:
        qk = rms_norm(qk, None, eps) * qk_norm
    qk = _rotate(qk, *rope_angles(batch, rope))
    if writes:
        v = heads[:, -spec.num_kv_heads :]  # the raw keys where there are no values
        v = rms_norm(v, None, eps) if v_norm else v
        slots = batch.slots[kv.group]
        _store(kv.k, kv.k_scale, slots, qk[:, spec.num_heads :])
        _store(kv.v, kv.v_scale, slots, v)
    return qk[:, : spec.num_heads].to(qkv.dtype)


def rope_angles(batch: AttentionBatch, rope: Rope) -> tuple[Tensor, Tensor]:
    """Return cos and sin, [S, 1, D / 2] float32, computed once a step for all layers of the kind."""

    def make() -> tuple[Tensor, Tensor]:
        angles = (batch.positions[:, None].float() * rope.inv_freq)[:, None]
        return angles.cos() * rope.factor, angles.sin() * rope.factor

    return batch.memo(rope, make)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _store(cache: Tensor, scales: Tensor | None, slots: Tensor, values: Tensor) -> None:
    """Write values [S, Hkv, D]; int8 takes one scale per token and head, its largest magnitude being 127."""
    if scales is None:
        cache.index_copy_(0, slots, values.to(cache.dtype))
        return
    values = values.float()
    scale = (values.abs().amax(-1) / INT8_MAX).clamp_min_(torch.finfo(torch.float32).tiny)
    cache.index_copy_(0, slots, (values / scale[..., None]).round_().to(torch.int8))
    scales.index_copy_(0, slots, scale)


def route(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Choose experts: softmax over all [S, E] in float32, the top_k of it, renormalised.

    Returns:
        Weights float32 and ids, both [S, top_k].
    """
    weights, ids = logits.float().softmax(-1).topk(top_k, dim=-1)
    return weights / weights.sum(-1, keepdim=True), ids


def moe(x: Tensor, weights: Tensor, ids: Tensor, experts: Experts, kind: Activation) -> Tensor:
    """Run each token through its experts and add up: one pair of GEMMs per expert over its tokens, sorted together.

    Args:
        x: [S, H].
        weights, ids: [S, top_k], from `route`.
    """
    asks_host("moe")
    num_tokens, top_k = ids.shape
    order = ids.flatten().argsort(stable=True)
    counts = ids.flatten().bincount(minlength=len(experts.load))
    experts.load.add_(counts)
    inputs = x[order // top_k].split(counts.tolist())
    outputs = torch.empty(num_tokens * top_k, x.shape[1], dtype=x.dtype, device=x.device)
    for expert, (tokens, place) in enumerate(zip(inputs, order.split(counts.tolist()), strict=True)):
        if len(tokens):
            hidden = act_and_mul(linear(tokens, _expert(experts.gate_up, expert)), kind)
            outputs.index_copy_(0, place, linear(hidden, _expert(experts.down, expert)))
    per_token = outputs.view(num_tokens, top_k, -1) * weights[..., None]
    return per_token.sum(1).to(x.dtype)


def _expert(matrix: Matrix, index: int) -> Matrix:
    if isinstance(matrix, Dense):
        return Dense(matrix.weight[index])
    return Int8(matrix.weight[index], matrix.scale[index])
