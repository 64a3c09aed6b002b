"""Paged attention on a CPU."""

from __future__ import annotations

from torch import Tensor

from cpu_kernels.kv_write import MAX_HEAD_DIM
from cpu_kernels.library import DTYPES, empty, kernels, unfit


def supports(q: Tensor) -> str | None:
    """Return why q [S, Hq, D] cannot be taken; None if it can."""
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"head size {q.shape[-1]}"
    if reason := unfit(q):
        return reason
    return None if q.stride(1) == q.shape[2] else "strided heads"


def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    table: Tensor,
    context_lens: Tensor,
    cu_q: Tensor,
    *,
    block_size: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attend every token to its row's cached keys and values, its own included.

    Args:
        q: [S, Hq, D].
        k, v: [N, Hkv, D] in q's dtype or int8, then with scales [N, Hkv] float32.
        table: [B, M] int32.
        context_lens: [B] int32; cu_q: [B + 1] int32.
    Returns:
        [S, Hq, D] in q's dtype.
    """
    tokens, heads, dim = q.shape
    out = empty((tokens, heads, dim), q.dtype)
    kernels()["paged_attention"](
        q, k, v, k_scale, v_scale, table, context_lens, cu_q, out, DTYPES[q.dtype], DTYPES[k.dtype], q.stride(0),
        k.stride(0), 0 if k_scale is None else k_scale.stride(0), table.stride(0), len(context_lens), heads,
        k.shape[1], dim, block_size, window or 0, scale, softcap or 0.0,
    )  # fmt: skip
    return out
