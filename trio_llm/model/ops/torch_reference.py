"""Every operation of the models in plain torch: the reference that kernels are tested against, and the CPU path.

Letters: S tokens, Hq/Hkv heads, D head size, N outputs, K inputs, E experts, I expert width, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from trio_llm.model.device.host_sync import requires_host_sync
from trio_llm.model.ops.matrices import Activation, Blocks, Dense, Experts, Int8, Matrix, Tiles
from trio_llm.model.paged.attention_batch import AttentionBatch, slots_of
from trio_llm.model.paged.kv_cache import AttentionSpec, KVLayout, LayerKV
from trio_llm.model.paged.rope import Rope

INT8_MAX = 127
INT8_BLOCK = 32  # activations that share a scale
INT8_KERNEL_MULTIPLE = 32
QUANTIZE_ELEMENTS = 2**21  # quantised at a time: 8 MiB of float32, four times while it is done
EXPAND_ELEMENTS = 4 * 1024 * 1024  # weights expanded at a time: 16 MiB of float32 (guessed)


def linear(x: Tensor, matrix: Matrix) -> Tensor:
    """Return x [S, K] times the matrix's transpose, [S, N], plus its bias."""
    if isinstance(matrix, Dense):
        if len(x) > 1 and x.device.type == "cpu" and _gemm_dtype(x.dtype) != x.dtype:
            out = _expanded_linear(x, matrix.weight)
            return (out if matrix.bias is None else out + matrix.bias).to(x.dtype)
        return F.linear(x, matrix.weight, matrix.bias)
    if isinstance(matrix, Blocks | Tiles):
        return _blocks_linear(x, matrix)
    assert isinstance(matrix, Int8), "only the kernels that packed a matrix can read it"
    out = _int8_linear(x, matrix.weight, matrix.scale)
    return out if matrix.bias is None else out + matrix.bias


def _int8_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    # torch's kernel reads weights as int8; its float32 path is 2 to 80 times slower than expanding them, and in
    # bfloat16 it reads out of bounds if K is not a multiple of 16 (measured, torch 2.13)
    fits = x.dtype != torch.float32 and x.device.type == "cpu" and weight.shape[1] % INT8_KERNEL_MULTIPLE == 0
    if fits and len(x) == 1:
        return torch.ops.aten._weight_int8pack_mm(x.contiguous(), weight, scale)
    wider = x.float() if x.dtype == torch.float16 else x  # integer sums overflow float16
    return (_expanded_linear(wider, weight) * scale).to(x.dtype)


def _expanded_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply in the dtype the processor is fastest in, expanding the weights a few rows at a time.

    That is for two rows of x and more: one is bound by reading the weights, which are smaller unexpanded. From how
    many rows on it is faster differs (measured: 5 to 20 for bfloat16, 32 to 40 for int8), and does not matter much, as
    native kernels take these products.
    """
    x = x.to(_gemm_dtype(x.dtype) if x.device.type == "cpu" else x.dtype)
    rows = max(1, EXPAND_ELEMENTS // weight.shape[1])
    return torch.cat([F.linear(x, part.to(x.dtype)) for part in weight.split(rows)], dim=-1)


def _blocks_linear(x: Tensor, matrix: Blocks | Tiles) -> Tensor:
    out = widened_linear(x.float(), matrix)
    return (out if matrix.bias is None else out + matrix.bias.float()).to(x.dtype)


def widened_linear(x: Tensor, matrix: Blocks | Tiles) -> Tensor:
    """Return x [S, K] times the transpose of blocks, widened to x's type a part at a time, without the bias."""
    x = x if matrix.order is None else x.index_select(1, matrix.order)
    outputs = matrix.shape[0] if isinstance(matrix, Tiles) else len(matrix.weight)
    rows = max(1, EXPAND_ELEMENTS // x.shape[1])
    parts = (matrix.rows(slice(first, first + rows)) for first in range(0, outputs, rows))
    return torch.cat([F.linear(x, dequantize(part).to(x.dtype)) for part in parts], dim=-1)


def dequantize(matrix: Blocks) -> Tensor:
    """Return the weight [N, K] in float32, its inputs in the weight's own order."""
    numbers = _numbers(matrix.weight).unflatten(-1, (matrix.scale.shape[-1], -1))
    scale, minimum = matrix.scale, matrix.minimum
    if matrix.outer is not None:
        scale = _times_outer(scale, matrix.outer[..., 0])
        minimum = None if minimum is None else _times_outer(minimum, matrix.outer[..., 1])
    if matrix.zero is not None:
        numbers -= matrix.zero[..., None]
    elif minimum is None and matrix.weight.dtype == torch.uint8:
        numbers -= 8
    numbers *= scale.float()[..., None]
    return (numbers if minimum is None else numbers.add_(minimum.float()[..., None])).flatten(-2)


def _numbers(weight: Tensor) -> Tensor:
    """Return the numbers of blocks [..., K] as float32."""
    if weight.dtype != torch.uint8:
        return weight.float()
    halves = weight.unflatten(-1, (-1, 1, 16))
    return torch.cat((halves & 0xF, halves >> 4), dim=-2).flatten(-3).float()


def _times_outer(scale: Tensor, outer: Tensor) -> Tensor:
    return (scale.unflatten(-1, (outer.shape[-1], -1)) * outer.float()[..., None]).flatten(-2)


def round_to_int8(x: Tensor) -> Tensor:
    """Return x [S, K] as kernels that round activations to 8 bits see it: a scale for each row and 32 inputs."""
    blocks = F.pad(x.float(), (0, -x.shape[1] % INT8_BLOCK)).unflatten(1, (-1, INT8_BLOCK))
    scale = blocks.abs().amax(-1, keepdim=True) / INT8_MAX
    inverse = torch.where(scale > 0, 1 / scale, 0)
    return ((blocks * inverse).round() * scale).flatten(1)[:, : x.shape[1]]


def quantize_rows(dense: Tensor, weight: Tensor, scale: Tensor) -> None:
    """Write dense [N, K] into weight [N, K] int8 and scale [N].

    The scale is rounded to its own dtype first: rounding it later would change a whole channel by up to 0.4 % in
    bfloat16.
    """
    rows = max(1, QUANTIZE_ELEMENTS // dense.shape[1])
    for source, target, factor in zip(dense.split(rows), weight.split(rows), scale.split(rows), strict=True):
        values = source.float()
        factor.copy_((values.abs().amax(1) / INT8_MAX).clamp_min(torch.finfo(scale.dtype).tiny))
        target.copy_((values / factor.float()[:, None]).round().clamp(-INT8_MAX, INT8_MAX))


@cache
def _gemm_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype for large products on this processor: float32 if it has no arithmetic in `dtype`."""
    features = {torch.bfloat16: ("avx512_bf16", "amx_bf16"), torch.float16: ("avx512_fp16", "amx_fp16")}
    has = torch.cpu.get_capabilities()
    missing = has.get("architecture") == "x86_64" and not any(has.get(name) for name in features.get(dtype, ()))
    return torch.float32 if missing else dtype


def embedding(token_ids: Tensor, matrix: Matrix, dtype: torch.dtype) -> Tensor:
    """Return rows of the matrix in `dtype`, the model's: [..., K] for ids [...]."""
    if isinstance(matrix, Blocks | Tiles):
        return dequantize(matrix.rows(token_ids)).to(dtype)
    assert isinstance(matrix, Dense | Int8)
    rows = F.embedding(token_ids, matrix.weight)
    return rows if isinstance(matrix, Dense) else (rows * matrix.scale[token_ids][..., None]).to(dtype)


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


def prepare_decodes(
    inputs: Tensor,
    tables: Sequence[Tensor],
    padding_row: int,
    layout: KVLayout,
    _: Sequence[Rope],
    max_context: int,
) -> AttentionBatch:
    """Build the batch of one token per row.

    Args:
        inputs: [3, B] int64: permanent rows, tokens, positions.
        tables: Per KV group [R, M] int32, the block tables of all rows.
        padding_row: The row whose tokens only pad the batch.
        max_context: Bound on positions; of the tables as many columns are taken as it needs.
    """
    rows, token_ids, positions = inputs.unbind(0)
    count, device = len(rows), rows.device
    columns = [-(-max_context // group.block_size) for group in layout.groups]
    own = tuple(table[:, :width].index_select(0, rows) for table, width in zip(tables, columns, strict=True))
    cu_q = torch.arange(count + 1, dtype=torch.int32, device=device)
    slots = slots_of(torch.arange(count, device=device), positions, own, layout)
    return AttentionBatch(
        token_ids, positions, cu_q, (positions + 1).to(torch.int32), own, slots, layout,
        max_q=1, max_context=max_context, padding=rows == padding_row,
    )  # fmt: skip


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
        v = heads[:, -spec.num_kv_heads :]  # the raw keys if there are no values
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
    """Write values [S, Hkv, D]; those of 8 bits have a scale per token and head, of which the largest is 127 or 448."""
    if scales is None:
        cache.index_copy_(0, slots, values.to(cache.dtype))
        return
    values, is_int8 = values.float(), cache.dtype == torch.int8
    largest = INT8_MAX if is_int8 else torch.finfo(cache.dtype).max
    scale = (values.abs().amax(-1) / largest).clamp_min_(torch.finfo(torch.float32).tiny)
    numbers = values / scale[..., None]
    numbers = (numbers.round_() if is_int8 else numbers).to(cache.dtype)
    # As bytes: torch on a CPU copies no FP8 by index.
    cache.view(torch.uint8).index_copy_(0, slots, numbers.view(torch.uint8))
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
    requires_host_sync("moe")
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
    if isinstance(matrix, Blocks):
        return matrix.rows(torch.tensor(index))
    assert isinstance(matrix, Int8)
    return Int8(matrix.weight[index], matrix.scale[index])
