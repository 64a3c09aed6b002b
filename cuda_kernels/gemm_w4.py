"""Linear layers of 4-bit weights on tensor cores, widened in registers: see gemm_w4.cu for the layout of weights."""

from __future__ import annotations

import torch
from torch import Tensor

from cuda_kernels.act import Activation
from cuda_kernels.gemm import choose_splits, split
from cuda_kernels.launch import io_define, kernel, unfit
from cuda_kernels.paged_attn import device_of
from cuda_kernels.tickets import take_tickets
from cuda_kernels.tuning import tuning

OUTPUTS, BK = 128, 128  # as in gemm_w4.cu
MAX_STAGES = 4


def supports(x: Tensor) -> str | None:
    """Say why x [rows, K] cannot be multiplied by 4-bit weights; None where it can."""
    if reason := unfit(x):
        return reason
    return f"{len(x)} rows" if len(x) > tuning(x.device).w4_rows else None


def supports_gated(x: Tensor, outputs: int) -> str | None:
    """Say the same of a gate and what it is multiplied by, `outputs` together."""
    return f"{outputs // 2} gated outputs" if outputs % 64 else supports(x)


def linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    *,
    zeros: Tensor | None = None,
    minima: Tensor | None = None,
    bias: Tensor | None = None,
    activation: Activation | None = None,
    splits: int | None = None,
) -> Tensor:
    """Return x [rows, K] times the transpose of a weight [N, K] of G groups, plus bias [N]; sums in float32.

    Args:
        weight: [N / 32, K / 32, 32, 4] int32.
        scales: [N / 32, G, 8, 4] float16 or float32.
        zeros: int8 of scales' shape, subtracted from the numbers.
        minima: Of scales' shape and dtype, added to the scaled numbers. With neither, 8 is subtracted.
        activation: The first half of the N outputs is a gate: act(gate) * up comes out, [rows, N / 2].
        splits: Parts of K at most, instead of what fills the device.
    """
    rows, gated = len(x), activation is not None
    tiles, groups = weight.shape[1], scales.shape[1]
    outputs = len(weight) * 32 // (2 if gated else 1)
    tile = next((size for size in (8, 16, 32) if rows <= size), 32 if gated else 64)
    grid = -(-outputs // OUTPUTS), -(-rows // tile)
    steps = -(-tiles * 32 // BK)
    span, parts = split(steps, splits or choose_splits(grid[0] * grid[1], device_of(x.device)))
    stage_bytes = tile * BK * 2 + (2 if gated else 1) * OUTPUTS * BK // 2
    stages = min(MAX_STAGES, tuning(x.device).gemm_bytes // stage_bytes)
    offset = 1 if zeros is not None else 2 if minima is not None else 0
    out = x.new_empty(rows, outputs)
    partial = None if parts == 1 else x.new_empty(parts, rows, len(weight) * 32, dtype=torch.float32)
    tickets = None if parts == 1 else take_tickets(x.device, grid[0] * grid[1])
    launched = kernel(
        "gemm_w4.cu", "gemm_w4", BM=tile, STAGES=stages, GATED=int(gated), GELU=int(activation == "gelu_tanh"),
        OFFSET=offset, WIDE_SCALES=int(scales.dtype == torch.float32), SPLIT=int(parts > 1),
        IO_FP16=io_define(x.dtype) or 0,
    )  # fmt: skip
    launched(
        (*grid, parts), (128, 1, 1), stages * stage_bytes,
        x, weight, scales, zeros if minima is None else minima, bias, partial, tickets, out,
        rows, outputs, tiles, groups, span, parts, x.stride(0),
    )  # fmt: skip
    return out
