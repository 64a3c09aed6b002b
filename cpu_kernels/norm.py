"""RMS norms on a CPU."""

from __future__ import annotations

from torch import Tensor

from cpu_kernels.library import DTYPES, empty, kernels, rows_of, unfit


def supports(x: Tensor, *_: object) -> str | None:
    """Return why x [..., H] cannot be taken; None if it can."""
    return unfit(x)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Divide the last dimension by its root mean square (in float32), then scale it by `weight`."""
    rows = rows_of(x)
    out = empty(tuple(rows.shape), x.dtype)
    kernels()["norm"](
        rows, None, weight, out, None, DTYPES[x.dtype], rows.shape[0], rows.shape[1], rows.stride(0), 0, eps
    )
    return out.view(x.shape)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (rms_norm(x + residual), x + residual), for x and residual [S, H]."""
    out, total = empty(tuple(x.shape), x.dtype), empty(tuple(x.shape), x.dtype)
    kernels()["norm"](
        x, residual, weight, out, total, DTYPES[x.dtype], len(x), x.shape[1], x.stride(0), residual.stride(0), eps
    )
    return out, total
