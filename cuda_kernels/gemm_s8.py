"""Linear layers of int8 weights by int8 activations on int8 tensor cores: exact sums, for many rows."""

from __future__ import annotations

import torch
from torch import Tensor

from cuda_kernels.act import Activation
from cuda_kernels.gemm import choose_splits, split
from cuda_kernels.launch import io_define, kernel, unfit
from cuda_kernels.paged_attn import device_of
from cuda_kernels.tickets import take_tickets

BM, BN, BK = 128, 128, 64  # as in gemm_s8.cu
STAGES = 3
MAX_INPUTS = 2**17  # of products up to 127 * 127, whose sum is an int32


def supports(x: Tensor, weight: Tensor) -> str | None:
    """Say why x [rows, K], once it is rounded, cannot be multiplied by weight [N, K] int8; None where it can."""
    if reason := unfit(x):
        return reason
    if not weight.is_contiguous():
        return "strided weights"
    outputs, inputs = weight.shape
    return f"{inputs} inputs and {outputs} outputs" if inputs % BK or inputs > MAX_INPUTS or outputs % 4 else None


def linear(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    scale: Tensor,
    *,
    bias: Tensor | None = None,
    activation: Activation | None = None,
    splits: int | None = None,
) -> Tensor:
    """Return x [rows, K] int8 with scale [rows] float32 times the transpose of weight [N, K] int8 with scale [N].

    Args:
        bias: [N], added. The result has the dtype of this and of `scale`.
        activation: The first half of the N outputs is a gate: act(gate) * up comes out, [rows, N / 2].
        splits: Parts of K at most, instead of what fills the device.
    """
    rows, inputs, parts = len(x), x.shape[1], 1 if activation is None else 2
    out = scale.new_empty(rows, len(weight) // parts)
    grid = -(-rows // BM), -(-out.shape[1] // (BN // parts))
    blocks = grid[0] * grid[1]
    span, shares = split(inputs // BK, splits or choose_splits(blocks, device_of(x.device)))
    partial = None if shares == 1 else x.new_empty(shares, rows, len(weight), dtype=torch.int32)
    tickets = None if shares == 1 else take_tickets(x.device, blocks)
    launched = kernel(
        "gemm_s8.cu", "gemm_s8", GATED=parts - 1, GELU=int(activation == "gelu_tanh"), STAGES=STAGES,
        SPLIT=int(shares > 1), IO_FP16=io_define(scale.dtype) or 0,
    )  # fmt: skip
    launched(
        (*grid, shares), (128, 1, 1), STAGES * (BM + BN) * BK,
        x, x_scale, weight, scale, bias, partial, tickets, out, rows, out.shape[1], inputs, span,
    )  # fmt: skip
    return out
