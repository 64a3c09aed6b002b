"""Normalise, rotate and store keys and values on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from cuda_kernels.launch import io_define, kernel, unfit
from cuda_kernels.paged_attn import HEAD_DIMS

WARPS = 8


def supports(qkv: Tensor, k_cache: Tensor) -> str | None:
    """Say why these cannot be taken; None where they can."""
    if reason := unfit(qkv):
        return reason
    if k_cache.shape[-1] not in HEAD_DIMS:
        return f"head size {k_cache.shape[-1]}"
    if k_cache.stride(0) * k_cache.element_size() % 16:
        return f"slots of {k_cache.stride(0) * k_cache.element_size()} bytes"
    return None


def write_kv(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    *,
    num_heads: int,
    qk_norm: Tensor | None,
    v_norm: bool,
    eps: float,
) -> Tensor:
    """Normalise and rotate q and k, write k and v into their slots, and return q [S, Hq, D].

    Args:
        qkv: [S, heads * D]: Hq of q, Hkv of k, Hkv of v; without the last, values are the raw keys; of Hq alone,
            nothing is written.
        cos, sin: [S, D / 2] float32.
        slots: [S] int64, -1 where nothing is written.
        k_cache, v_cache: [slots, Hkv, D], the last two dimensions dense; qkv's dtype, or int8 or
            float8_e4m3fn with scales.
        k_scale, v_scale: [slots, Hkv] float32, or None.
        qk_norm: [Hq + Hkv, D] float32, weights of the norm before the rotation; None for no norm.
    """
    tokens, (_, kv_heads, head_dim) = len(qkv), k_cache.shape
    heads = qkv.shape[1] // head_dim
    writes = heads > num_heads
    values_at = num_heads + kv_heads if heads == num_heads + 2 * kv_heads else num_heads
    q = qkv.new_empty(tokens, num_heads, head_dim)
    launched = kernel(
        "kv_write.cu", "kv_write",
        HEAD_DIM=head_dim, KV_8BIT=int(k_scale is not None),
        KV_FP8=int(k_cache.dtype == torch.float8_e4m3fn), IO_FP16=io_define(qkv.dtype) or 0,
    )  # fmt: skip
    launched(
        (tokens, -(-(num_heads + 2 * kv_heads * writes) // WARPS), 1), (WARPS * 32, 1, 1), 0,
        qkv, cos, sin, slots, qk_norm, q, k_cache, v_cache, k_scale, v_scale,
        qkv.stride(0), num_heads, kv_heads * writes, values_at, k_cache.stride(0),
        0 if k_scale is None else k_scale.stride(0), int(v_norm), eps,
    )  # fmt: skip
    return q
