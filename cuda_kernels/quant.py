"""Quantise weights on a GPU."""

from __future__ import annotations

from torch import Tensor

from cuda_kernels.launch import io_define, kernel, unfit

THREADS = 256


def supports(dense: Tensor) -> str | None:
    """Say why dense [N, K] cannot be taken; None where it can."""
    if reason := unfit(dense):
        return reason
    if dense.shape[1] % 8 or not dense.is_contiguous():
        return f"rows of {dense.shape[1]}"
    return None


def quantize_rows(dense: Tensor, weight: Tensor, scale: Tensor) -> None:
    """Write dense [N, K] into weight [N, K] int8 and scale [N] in dense's dtype."""
    launched = kernel("quant.cu", "quantize_rows", IO_FP16=io_define(dense.dtype) or 0)
    launched((len(dense), 1, 1), (THREADS, 1, 1), THREADS // 8, dense, weight, scale, dense.shape[1])
