"""RMSNorm on a GPU."""

from __future__ import annotations

from torch import Tensor

from cuda_kernels.launch import Kernel, io_define, kernel, unfit

MAX_HIDDEN = 32768  # what a block's registers hold


def supports(x: Tensor) -> str | None:
    """Say why x [..., H] cannot be normalised by this kernel; None where it can."""
    if reason := unfit(x):
        return reason
    if x.shape[-1] % 8 or x.shape[-1] > MAX_HIDDEN:
        return f"hidden size {x.shape[-1]}"
    return None


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Return x [..., H] over its root mean square times weight [H], in float32 until it is stored."""
    rows = x.reshape(-1, x.shape[-1])
    out = rows.new_empty(rows.shape)
    launched, threads = _specialise("rms_norm", x)
    launched((len(rows), 1, 1), (threads, 1, 1), threads // 8, rows, weight, out, rows.stride(0), eps)
    return out.view(x.shape)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (rms_norm(x + residual), x + residual), both [S, H]."""
    total, out = residual.new_empty(residual.shape), residual.new_empty(residual.shape)
    launched, threads = _specialise("add_rms_norm", x)
    args = (x, residual.contiguous(), weight, total, out, x.stride(0), eps)
    launched((len(x), 1, 1), (threads, 1, 1), threads // 8, *args)
    return out, total


def _specialise(entry: str, x: Tensor) -> tuple[Kernel, int]:
    """Choose threads: one 16-byte piece each, up to 512 threads."""
    hidden = x.shape[-1]
    threads = min(512, -(-hidden // 256) * 32)
    return kernel("norm.cu", entry, HIDDEN=hidden, THREADS=threads, IO_FP16=io_define(x.dtype) or 0), threads
