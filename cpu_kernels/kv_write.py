"""Rotary angles and writes to the paged cache, on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from cpu_kernels.library import DTYPES, empty, kernels, unfit

MAX_HEAD_DIM = 1024


def supports(qkv: Tensor, k: Tensor) -> str | None:
    """Return why qkv [S, C] and a cache [slots, Hkv, D] cannot be taken; None if they can."""
    if k.shape[-1] > MAX_HEAD_DIM:
        return f"head size {k.shape[-1]}"
    return unfit(qkv)


def rope_angles(positions: Tensor, inv_freq: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Return cos and sin [S, D / 2] float32 of positions [S] int64 times inv_freq [D / 2], multiplied by `factor`."""
    shape = (len(positions), len(inv_freq))
    cos, sin = empty(shape, torch.float32), empty(shape, torch.float32)
    kernels()["rope_angles"](positions, inv_freq, cos, sin, *shape, factor)
    return cos, sin


def write_kv(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    k: Tensor,
    v: Tensor,
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
        qkv: [S, (Hq + 2 Hkv) * D]; without the last Hkv heads values are the raw keys; of Hq heads only, nothing is
            written.
        cos, sin: [S, D / 2] float32.
        slots: [S] int64, negative for tokens that are not written.
        k, v: [N, Hkv, D] in qkv's dtype or int8, then with scales [N, Hkv] float32.
    """
    _, kv_heads, dim = k.shape
    total = qkv.shape[1] // dim
    q = empty((len(qkv), num_heads, dim), qkv.dtype)
    kernels()["write_kv"](
        qkv, cos, sin, qk_norm, slots, q, k, v, k_scale, v_scale, DTYPES[qkv.dtype], DTYPES[k.dtype], len(qkv),
        qkv.stride(0), num_heads, kv_heads, dim, k.stride(0), 0 if k_scale is None else k_scale.stride(0),
        int(total > num_heads), int(total > num_heads + kv_heads), int(v_norm), eps,
    )  # fmt: skip
    return q
