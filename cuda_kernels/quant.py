"""Round rows to int8 on a GPU: weights as they are loaded, activations before a product."""

from __future__ import annotations

import torch
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


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x [S, K] in int8 and a float32 scale for each row [S]: its largest magnitude becomes 127."""
    out = x.new_empty(x.shape, dtype=torch.int8)
    scale = x.new_empty(len(x), dtype=torch.float32)
    launched = kernel("quant.cu", "quantize_tokens", IO_FP16=io_define(x.dtype) or 0)
    launched((len(x), 1, 1), (THREADS, 1, 1), THREADS // 8, x, out, scale, x.shape[1], x.stride(0))
    return out, scale
