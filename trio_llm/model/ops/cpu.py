"""The operations of the seam on native CPU kernels, and for each one the reason why its kernel cannot take a call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from cpu_kernels import act, attention, kv_write, library, norm, sample, step
from cpu_kernels import argmax as greedy
from cpu_kernels import linear as products
from cpu_kernels import logprobs as scoring
from cpu_kernels import mask as masking
from cpu_kernels import moe as experts_on_cpu
from cpu_kernels.blocks import pack_blocks
from trio_llm.model.ops import torch_reference as ops_torch
from trio_llm.model.ops.matrices import Activation, Blocks, Dense, Experts, Int8, Matrix, Panels, keeps_integers
from trio_llm.model.paged.attention_batch import AttentionBatch
from trio_llm.model.paged.kv_cache import AttentionSpec, KVLayout, LayerKV
from trio_llm.model.paged.rope import Rope

NAME = "native"
# The reason for calling torch instead of a kernel: torch looks rows up as fast.
UNPACKED = "a table that is not packed"
LIBRARIES = {UNPACKED: "torch"}

prepare = library.load
keeps = keeps_integers
set_num_threads = library.set_num_threads


def pack(matrix: Dense | Int8 | Blocks) -> Panels:
    """Pack a matrix for the kernels, once; the caller drops the original."""
    bias = None if matrix.bias is None else matrix.bias.float()
    if isinstance(matrix, Blocks):
        packed, kind = pack_blocks(
            matrix.weight, matrix.scale, zero=matrix.zero, minimum=matrix.minimum, outer=matrix.outer
        )
        return Panels(packed, (matrix.weight.shape[-2], matrix.inputs), kind, bias=bias, order=matrix.order)
    shape = matrix.weight.shape[-2], matrix.weight.shape[-1]
    if isinstance(matrix, Dense):
        return Panels(products.pack(matrix.weight), shape, matrix.weight.dtype, bias=bias)
    int8 = "int8_exact" if matrix.exact else torch.int8
    return Panels(products.pack(matrix.weight, int8), shape, int8, scale=matrix.scale.float(), bias=bias)


def linear(x: Tensor, matrix: Panels) -> Tensor:
    """See `seam.linear`. For blocks and INT8 weights that are not exact, activations have 8 bits, 32 to a scale."""
    return _product(x, matrix, None)


def gated_linear(x: Tensor, gate_up: Panels, kind: Activation) -> Tensor:
    """See `seam.gated_linear`."""
    return _product(x, gate_up, kind)


def logits(x: Tensor, head: Panels, out: Tensor) -> Tensor:
    """See `seam.logits`."""
    return _product(x, head, None, out)


def _product(x: Tensor, matrix: Panels, activation: Activation | None, out: Tensor | None = None) -> Tensor:
    return products.linear(
        x if matrix.order is None else x.index_select(1, matrix.order), matrix.weight, matrix.shape, matrix.kind,
        scale=matrix.scale, bias=matrix.bias, activation=activation, out=out,
    )  # fmt: skip


def embedding(token_ids: Tensor, matrix: Matrix, dtype: torch.dtype) -> Tensor:
    """See `seam.embedding`."""
    if not isinstance(matrix, Panels):
        return ops_torch.embedding(token_ids, matrix, dtype)
    return products.embed(token_ids, matrix.weight, matrix.shape, matrix.kind, matrix.scale, dtype)


rms_norm = norm.rms_norm
add_rms_norm = norm.add_rms_norm
act_and_mul = act.act_and_mul


def prepare_decodes(
    inputs: Tensor,
    tables: Sequence[Tensor],
    padding_row: int,
    layout: KVLayout,
    _: Sequence[Rope],
    max_context: int,
) -> AttentionBatch:
    """See `ops_torch.prepare_decodes`."""
    rows, token_ids, positions = inputs.unbind(0)
    sizes = [group.block_size for group in layout.groups]
    groups = [(table, -(-max_context // size), size) for table, size in zip(tables, sizes, strict=True)]
    done = step.prepare(rows, positions, groups, padding_row)
    return AttentionBatch(
        token_ids, positions, done.cu_q, done.context, done.tables, done.slots, layout,
        max_q=1, max_context=max_context, padding=done.padding,
    )  # fmt: skip


def write_kv(
    qkv: Tensor,
    batch: AttentionBatch,
    kv: LayerKV,
    spec: AttentionSpec,
    rope: Rope,
    *,
    qk_norm: Tensor | None,
    v_norm: bool,
    eps: float,
) -> Tensor:
    """See `seam.write_kv`."""
    cos, sin = batch.memo((NAME, rope), lambda: kv_write.rope_angles(batch.positions, rope.inv_freq, rope.factor))
    return kv_write.write_kv(
        qkv, cos, sin, batch.slots[kv.group], kv.k, kv.v, kv.k_scale, kv.v_scale,
        num_heads=spec.num_heads, qk_norm=qk_norm, v_norm=v_norm, eps=eps,
    )  # fmt: skip


def paged_attention(q: Tensor, batch: AttentionBatch, kv: LayerKV, spec: AttentionSpec) -> Tensor:
    """See `seam.paged_attention`."""
    attended = attention.paged_attention(
        q, kv.k, kv.v, kv.k_scale, kv.v_scale, batch.tables[kv.group], batch.context_lens, batch.cu_q,
        block_size=batch.layout.groups[kv.group].block_size,
        scale=spec.scale, window=spec.window, softcap=spec.softcap,
    )  # fmt: skip
    return attended.flatten(1)


route = experts_on_cpu.route


def moe(x: Tensor, weights: Tensor, ids: Tensor, experts: Experts, kind: Activation) -> Tensor:
    """See `seam.moe`."""
    gate_up, down = experts.gate_up, experts.down
    assert isinstance(gate_up, Panels)
    assert isinstance(down, Panels)
    scales = None if gate_up.scale is None or down.scale is None else (gate_up.scale, down.scale)
    return experts_on_cpu.moe(
        x,
        weights,
        ids,
        gate_up.weight,
        down.weight,
        experts.load,
        down.shape[1],
        (gate_up.kind, down.kind),
        kind,
        scales,
    )


argmax = greedy.argmax
draw = sample.draw
logprobs = scoring.logprobs
mask = masking.mask


def _linear(x: Tensor, matrix: Matrix, *_: object) -> str | None:
    if not isinstance(matrix, Panels):
        return "weights that are not packed"
    if isinstance(matrix.kind, torch.dtype) and matrix.kind not in (x.dtype, torch.int8):
        return f"{x.dtype} times {matrix.kind}"
    return products.supports(x)


def _logits(x: Tensor, head: Matrix, out: Tensor) -> str | None:
    return _linear(x, head) or (None if out.is_contiguous() else "strided results")


def _cache(kv: LayerKV) -> str | None:
    return "keys and values of FP8" if kv.k.dtype == torch.float8_e4m3fn else None


def _embedding(_: Tensor, matrix: Matrix, __: torch.dtype) -> str | None:
    return None if isinstance(matrix, Panels) else UNPACKED


def _moe(x: Tensor, experts: Experts) -> str | None:
    return _linear(x, experts.gate_up) or _linear(x, experts.down)


# Operation -> why its kernel cannot take these arguments; None if it can.
WHY_NOT: Mapping[str, Callable[..., str | None]] = {
    "pack": lambda weight: None if weight.dtype in (*library.DTYPES, torch.uint8) else f"weights of {weight.dtype}",
    "linear": _linear,
    "gated_linear": _linear,
    "logits": _logits,
    "embedding": _embedding,
    "rms_norm": norm.supports,
    "add_rms_norm": norm.supports,
    "act_and_mul": act.supports,
    "prepare_decodes": lambda _: None,
    "write_kv": lambda qkv, kv: _cache(kv) or kv_write.supports(qkv, kv.k),
    "paged_attention": lambda q, _batch, kv, _spec: _cache(kv) or attention.supports(q),
    "route": experts_on_cpu.supports_route,
    "moe": _moe,
    "argmax": sample.supports,
    "draw": sample.supports,
    "logprobs": sample.supports,
    "mask": sample.supports,
}
