"""The operations of `ops_torch` by CUDA kernels, and for each of them why a call may not be one for its kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from cuda_kernels import act, gemm, gemv, kv_write, norm, paged_attn, quant
from cuda_kernels import moe as experts_on_gpu
from cuda_kernels import sample as choosing
from trio_llm.model import ops, ops_torch
from trio_llm.model.attention import AttentionBatch
from trio_llm.model.kv_cache import AttentionSpec, LayerKV
from trio_llm.model.logit_edits import LogitEdits
from trio_llm.model.ops_torch import Activation, Dense, Experts, Int8, Matrix, rope_angles
from trio_llm.model.rope import Rope

# The reason of a call that this module takes, but not to a kernel of ours.
FOR_CUBLAS = "many rows"
_WIDENED_ELEMENTS = 64 * 2**20  # weights widened at a time: 128 MiB (guessed)


def linear(x: Tensor, matrix: Matrix) -> Tensor:
    """See `ops_torch.linear`."""
    if len(x) <= gemv.MAX_ROWS:
        scale = matrix.scale if isinstance(matrix, Int8) else None
        return gemv.linear(x, matrix.weight, scale=scale, bias=matrix.bias)
    if isinstance(matrix, Dense):
        return ops_torch.linear(x, matrix)
    if _tiled(x, matrix):
        return gemm.linear(x, matrix.weight, matrix.scale, bias=matrix.bias)
    return _widened_linear(x, matrix)


def gated_linear(x: Tensor, gate_up: Matrix, kind: Activation) -> Tensor:
    """See `ops.gated_linear`."""
    if len(x) <= gemv.MAX_ROWS:
        scale = gate_up.scale if isinstance(gate_up, Int8) else None
        return gemv.linear(x, gate_up.weight, scale=scale, bias=gate_up.bias, activation=kind)
    if isinstance(gate_up, Int8) and _tiled(x, gate_up):
        return gemm.linear(x, gate_up.weight, gate_up.scale, bias=gate_up.bias, activation=kind)
    return ops.act_and_mul(ops.linear(x, gate_up), kind)


def _tiled(x: Tensor, matrix: Int8) -> bool:
    return len(x) <= gemm.MAX_ROWS and gemm.supports(x, matrix.weight) is None


def _widened_linear(x: Tensor, matrix: Int8) -> Tensor:
    """Multiply by cuBLAS, the weights widened a part at a time."""
    rows = max(1, _WIDENED_ELEMENTS // x.shape[1])
    parts = zip(matrix.weight.split(rows), matrix.scale.split(rows), strict=True)
    out = [_scaled_product(x, weight.to(x.dtype), scale) for weight, scale in parts]
    joined = out[0] if len(out) == 1 else torch.cat(out, dim=-1)
    return joined if matrix.bias is None else joined.add_(matrix.bias)


def _scaled_product(x: Tensor, wide: Tensor, scale: Tensor) -> Tensor:
    """Multiply by whole numbers and their scales, which come after, as sums are wider. `wide` may be overwritten.

    Not in float16: the sum of whole numbers is stored first, and overflows where the product is tens.
    """
    if x.dtype == torch.float16:
        return F.linear(x, wide.mul_(scale[:, None]))
    return F.linear(x, wide).mul_(scale)


rms_norm = norm.rms_norm
add_rms_norm = norm.add_rms_norm
act_and_mul = act.act_and_mul


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
    attended = paged_attn.paged_attention(
        q, kv.k, kv.v, kv.k_scale, kv.v_scale, batch.tables[kv.group], batch.context_lens, batch.cu_q,
        block_size=_block_size(batch, kv), max_q=batch.max_q, max_context=batch.max_context,
        scale=spec.scale, window=spec.window, softcap=spec.softcap,
    )  # fmt: skip
    return attended.flatten(1)


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


def _linear(x: Tensor, matrix: Matrix) -> str | None:
    if len(x) <= gemv.MAX_ROWS:
        return gemv.supports(x, matrix.weight)
    return None if isinstance(matrix, Int8) and _tiled(x, matrix) else FOR_CUBLAS


def _moe(x: Tensor, experts: Experts) -> str | None:
    return experts_on_gpu.supports(x, experts.gate_up.weight, experts.down.weight)


# Operation -> why these arguments are not for its kernel; None where they are.
WHY_NOT: Mapping[str, Callable[..., str | None]] = {
    "linear": _linear,
    "gated_linear": _linear,
    "rms_norm": norm.supports,
    "add_rms_norm": norm.supports,
    "act_and_mul": act.supports,
    "write_kv": lambda qkv, kv: kv_write.supports(qkv, kv.k),
    "paged_attention": lambda q, batch, kv: paged_attn.supports(q, kv.k, _block_size(batch, kv)),
    "route": experts_on_gpu.supports_route,
    "moe": _moe,
    "quantize_rows": quant.supports,
    "sample": choosing.supports,
    "token_logprobs": choosing.supports,
}
