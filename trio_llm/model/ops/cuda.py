"""The operations of the seam on CUDA kernels, and for each one the reason why its kernel cannot take a call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from cuda_kernels import act, gemm, gemm_s8, gemm_w4, gemv, kv_write, norm, paged_attn, quant, step
from cuda_kernels import moe as experts_on_gpu
from cuda_kernels import sample as choosing
from cuda_kernels.tuning import tuning
from trio_llm.model.ops import fp8, long_prefills
from trio_llm.model.ops import torch_reference as ops_torch
from trio_llm.model.ops.logit_edits import LogitEdits
from trio_llm.model.ops.matrices import Activation, Blocks, Dense, Experts, Fp8, Int8, SingleMatrix, Tiles
from trio_llm.model.ops.torch_reference import rope_angles
from trio_llm.model.paged.attention_batch import AttentionBatch
from trio_llm.model.paged.kv_cache import AttentionSpec, KVLayout, LayerKV
from trio_llm.model.paged.rope import Rope

NAME = "cuda"
# The reason for calling a library instead of a kernel.
FOR_CUBLAS = "many rows"
FOR_WIDENED = "many rows, INT8 weights widened"
FOR_SCALED_PRODUCT = "FP8 weights"
FOR_FLASH = "long prefills"
FOR_FLASH_IN_PART = "long prefills, the kernel for other rows"
LIBRARIES = {
    FOR_CUBLAS: "cublas", FOR_WIDENED: "cublas", FOR_SCALED_PRODUCT: "torch",
    FOR_FLASH: "torch", FOR_FLASH_IN_PART: "torch",
}  # fmt: skip
HALVES = (torch.bfloat16, torch.float16)


def prepare(_: Callable[[int, int], None]) -> None:
    """Do nothing: kernels are compiled at their first call, for its shapes."""


def keeps(matrix: Blocks, dtype: torch.dtype, is_expert: bool) -> bool:
    """Return whether kernels multiply activations of this type by a matrix as it is stored."""
    if dtype not in HALVES or is_expert:
        return False
    return fp8.keeps(matrix) if matrix.is_fp8 else Tiles.can_hold(matrix)


def pack(matrix: Dense | Int8 | Blocks) -> SingleMatrix:
    """Return a matrix in the kernels' layout; only blocks have one of their own."""
    if not isinstance(matrix, Blocks):
        return matrix
    return Fp8.of(matrix) if matrix.is_fp8 else Tiles.of(matrix)


def linear(x: Tensor, matrix: Dense | Int8 | Tiles | Fp8) -> Tensor:
    """See `ops_torch.linear`."""
    if isinstance(matrix, Fp8):
        return fp8.linear(x, matrix)
    if isinstance(matrix, Tiles):
        return _tiles_linear(x, matrix)
    if len(x) <= gemv.MAX_ROWS:
        scale = matrix.scale if isinstance(matrix, Int8) else None
        return gemv.linear(x, matrix.weight, scale=scale, bias=matrix.bias)
    if isinstance(matrix, Dense):
        return ops_torch.linear(x, matrix)
    return _int8_linear(x, matrix, None) if _has_kernel(x, matrix) else _widened_linear(x, matrix)


def gated_linear(x: Tensor, gate_up: Dense | Int8 | Tiles | Fp8, kind: Activation) -> Tensor:
    """See `seam.gated_linear`."""
    if isinstance(gate_up, Tiles):
        if gemm_w4.supports_gated(x, gate_up.shape[0]) is None:
            return _tiles_product(x, gate_up, kind)
    elif not isinstance(gate_up, Fp8) and len(x) <= gemv.MAX_ROWS:
        scale = gate_up.scale if isinstance(gate_up, Int8) else None
        return gemv.linear(x, gate_up.weight, scale=scale, bias=gate_up.bias, activation=kind)
    if isinstance(gate_up, Int8) and _has_kernel(x, gate_up):
        return _int8_linear(x, gate_up, kind)
    product = linear(x, gate_up)
    activate = ops_torch.act_and_mul if act.supports(product) else act.act_and_mul
    return activate(product, kind)


def normed_linear(
    x: Tensor, residual: Tensor | None, norm: Tensor, eps: float, matrix: Dense | Int8, kind: Activation | None
) -> tuple[Tensor, Tensor]:
    """Return the product, gated if there is a kind, of rms_norm(x + residual), and the sum: see `seam.AddNorm`."""
    scale = matrix.scale if isinstance(matrix, Int8) else None
    return gemv.normed_linear(x, residual, norm, eps, matrix.weight, scale=scale, bias=matrix.bias, activation=kind)


def _tiles_linear(x: Tensor, matrix: Tiles) -> Tensor:
    if gemm_w4.supports(x) is None:
        return _tiles_product(x, matrix, None)
    out = ops_torch.widened_linear(x, matrix)
    return out if matrix.bias is None else out.add_(matrix.bias)


def _tiles_product(x: Tensor, matrix: Tiles, kind: Activation | None) -> Tensor:
    x = x if matrix.order is None else x.index_select(1, matrix.order)
    return gemm_w4.linear(
        x, matrix.weight, matrix.scale, zeros=matrix.zero, minima=matrix.minimum, bias=matrix.bias, activation=kind
    )


def _has_kernel(x: Tensor, matrix: Int8) -> bool:
    """Return whether more rows than a GEMV takes have a kernel: the one for many rounds them to 8 bits."""
    if gemm.supports(x, matrix.weight) is None:
        return True
    return not matrix.exact and gemm_s8.supports(x, matrix.weight) is None


def _int8_linear(x: Tensor, matrix: Int8, kind: Activation | None) -> Tensor:
    weight, scale, bias = matrix.weight, matrix.scale, matrix.bias
    if gemm.supports(x, weight) is None:
        return gemm.linear(x, weight, scale, bias=bias, activation=kind)
    return gemm_s8.linear(*quant.quantize_tokens(x), weight, scale, bias=bias, activation=kind)


def _widened_linear(x: Tensor, matrix: Int8) -> Tensor:
    """Multiply with cuBLAS, widening the weights a part at a time: where activations may not be rounded."""
    rows = max(1, tuning(x.device).widened_elements // x.shape[1])
    parts = zip(matrix.weight.split(rows), matrix.scale.split(rows), strict=True)
    out = [_scaled_product(x, weight.to(x.dtype), scale) for weight, scale in parts]
    joined = out[0] if len(out) == 1 else torch.cat(out, dim=-1)
    return joined if matrix.bias is None else joined.add_(matrix.bias)


def _scaled_product(x: Tensor, wide: Tensor, scale: Tensor) -> Tensor:
    """Multiply by integers, then by their scales, since sums are wider. `wide` may be overwritten.

    Float16 scales first: it stores the integer sum, which overflows even if the product is in the tens.
    """
    if x.dtype == torch.float16:
        return F.linear(x, wide.mul_(scale[:, None]))
    return F.linear(x, wide).mul_(scale)


rms_norm = norm.rms_norm
add_rms_norm = norm.add_rms_norm
act_and_mul = act.act_and_mul


def prepare_decodes(
    inputs: Tensor,
    tables: Sequence[Tensor],
    padding_row: int,
    layout: KVLayout,
    ropes: Sequence[Rope],
    max_context: int,
) -> AttentionBatch:
    """See `ops_torch.prepare_decodes`; the angles of all ropes are there already."""
    rows, token_ids, positions = inputs.unbind(0)
    kinds = list(dict.fromkeys(ropes))
    sizes = [group.block_size for group in layout.groups]
    groups = [(table, -(-max_context // size), size) for table, size in zip(tables, sizes, strict=True)]
    done = step.prepare(rows, positions, groups, [(rope.inv_freq, rope.factor) for rope in kinds], padding_row)
    batch = AttentionBatch(
        token_ids, positions, done.cu_q, done.context, done.tables, done.slots, layout,
        max_q=1, max_context=max_context, padding=done.padding,
    )  # fmt: skip
    for rope, (cos, sin) in zip(kinds, done.angles, strict=True):
        batch.memo(rope, partial(_angles, cos, sin))
    return batch


def _angles(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return cos[:, None], sin[:, None]  # as `rope_angles` returns them


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
    """See `ops_torch.write_kv`."""
    cos, sin = (angle[:, 0] for angle in rope_angles(batch, rope))
    return kv_write.write_kv(
        qkv, cos, sin, batch.slots[kv.group], kv.k, kv.v, kv.k_scale, kv.v_scale,
        num_heads=spec.num_heads, qk_norm=qk_norm, v_norm=v_norm, eps=eps,
    )  # fmt: skip


def paged_attention(q: Tensor, batch: AttentionBatch, kv: LayerKV, spec: AttentionSpec) -> Tensor:
    """See `attention_torch.paged_attention`."""
    out, size = torch.empty_like(q), _block_size(batch, kv)
    for part in long_prefills.parts_of(q, batch, kv, spec):
        if part.is_long:
            blocks, context = part.tables[0, : -(-part.max_context // size)], part.max_context
            long = long_prefills.attend(q[part.tokens], kv.k, kv.v, blocks, context, size, spec.scale)
            out[part.tokens] = long
            continue
        paged_attn.paged_attention(
            q, kv.k, kv.v, kv.k_scale, kv.v_scale, part.tables, part.context_lens, part.cu_q,
            block_size=size, max_q=part.max_q, max_context=part.max_context,
            scale=spec.scale, window=spec.window, softcap=spec.softcap, out=out,
        )  # fmt: skip
    return out.flatten(1)


route = experts_on_gpu.route
quantize_rows = quant.quantize_rows


def moe(x: Tensor, weights: Tensor, ids: Tensor, experts: Experts, kind: Activation) -> Tensor:
    """See `ops_torch.moe`."""
    gate_up, down = experts.gate_up, experts.down
    scales = (gate_up.scale, down.scale) if isinstance(gate_up, Int8) and isinstance(down, Int8) else None
    return experts_on_gpu.moe(x, weights, ids, gate_up.weight, down.weight, experts.load, kind, scales)


def sample(
    logits: Tensor, params: Tensor | None, keys: Tensor | None, hashes: Tensor, edits: LogitEdits | None
) -> Tensor:
    """See `Sampler.sample`; return ids [R]."""
    lists = None
    if edits is not None:
        e = edits
        lists = choosing.Edits(e.starts, e.masked, e.biased, e.bias, e.seen, e.penalties, e.masks)
    return choosing.sample(logits, params, keys, hashes, lists)


token_logprobs = choosing.token_logprobs


def _block_size(batch: AttentionBatch, kv: LayerKV) -> int:
    return batch.layout.groups[kv.group].block_size


def _paged_attention(q: Tensor, batch: AttentionBatch, kv: LayerKV, spec: AttentionSpec) -> str | None:
    if reason := paged_attn.supports(q, kv.k, _block_size(batch, kv)):
        return reason
    kinds = {part.is_long for part in long_prefills.parts_of(q, batch, kv, spec)}
    return None if kinds == {False} else FOR_FLASH if kinds == {True} else FOR_FLASH_IN_PART


def _linear(x: Tensor, matrix: Dense | Int8 | Tiles | Fp8) -> str | None:
    if isinstance(matrix, Fp8):
        return FOR_SCALED_PRODUCT
    if isinstance(matrix, Tiles):
        return None if gemm_w4.supports(x) is None else FOR_CUBLAS
    if len(x) <= gemv.MAX_ROWS:
        return gemv.supports(x, matrix.weight)
    if isinstance(matrix, Dense):
        return FOR_CUBLAS
    return None if _has_kernel(x, matrix) else FOR_WIDENED


def _normed_linear(
    x: Tensor, residual: Tensor | None, weight: Tensor, matrix: Dense | Int8 | Tiles | Fp8
) -> str | None:
    if isinstance(matrix, Tiles | Fp8):
        return "weights of 4 bits or FP8"
    return gemv.supports_norm(x, residual, weight, matrix.weight)


def _moe(x: Tensor, experts: Experts) -> str | None:
    return experts_on_gpu.supports(x, experts.gate_up.weight, experts.down.weight)


# Operation -> why its kernel cannot take these arguments; None if it can.
WHY_NOT: Mapping[str, Callable[..., str | None]] = {
    "pack": lambda _: None,
    "linear": _linear,
    "gated_linear": _linear,
    "normed_linear": _normed_linear,
    "rms_norm": norm.supports,
    "add_rms_norm": norm.supports,
    "act_and_mul": act.supports,
    "prepare_decodes": step.supports,
    "write_kv": lambda qkv, kv: kv_write.supports(qkv, kv.k),
    "paged_attention": _paged_attention,
    "route": experts_on_gpu.supports_route,
    "moe": _moe,
    "quantize_rows": quant.supports,
    "sample": choosing.supports,
    "token_logprobs": choosing.supports,
}
