"""Linear layers of a few rows on a GPU: weights are streamed once, activation or residual in the same launch."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from cuda_kernels.launch import io_define, kernel, unfit

MAX_ROWS = 8
WARPS, OUTPUTS = 4, 2


def supports(x: Tensor, weight: Tensor) -> str | None:
    """Say why x [rows, K] times weight [N, K] cannot be taken; None where it can."""
    if reason := unfit(x):
        return reason
    if weight.dtype not in (x.dtype, torch.int8):
        return f"weights of {weight.dtype}"
    if len(x) > MAX_ROWS:
        return f"more than {MAX_ROWS} rows"
    if not weight.is_contiguous():
        return "strided weights"
    if x.shape[1] % (16 if weight.dtype == torch.int8 else 8):
        return f"{x.shape[1]} inputs"
    return None


def linear(
    x: Tensor,
    weight: Tensor,
    *,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    activation: Literal["silu", "gelu_tanh"] | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Return x times the weight's transpose, then the epilogue; all sums in float32.

    Args:
        x: [rows, K], at most MAX_ROWS.
        weight: [N, K] in x's dtype, or int8 with `scale` [N] in x's dtype.
        bias: [N].
        activation: The first half of the N outputs is a gate: act(gate) * up comes out, [rows, N / 2].
        residual: As the result, added last.
    """
    rows, inputs = x.shape
    gated = activation is not None
    outputs = len(weight) // (2 if gated else 1)
    out = x.new_empty(rows, outputs)
    most = 1 << (rows - 1).bit_length()
    launched = kernel(
        "gemv.cu", "gemv", M=most, INT8=int(scale is not None), GATED=int(gated), GELU=int(activation == "gelu_tanh"),
        IO_FP16=io_define(x.dtype) or 0,
    )  # fmt: skip
    launched(
        (-(-outputs // (WARPS * OUTPUTS)), 1, 1), (WARPS * 32, 1, 1), 0,
        x, weight, scale, bias, residual, out, rows, outputs, inputs, x.stride(0),
    )  # fmt: skip
    return out
