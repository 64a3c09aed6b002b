"""Linear layers of more than a few rows on tensor cores: int8 weights, and experts of either kind."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cuda_kernels.act import Activation
from cuda_kernels.launch import io_define, kernel, unfit
from cuda_kernels.paged_attn import Device, device_of
from cuda_kernels.tickets import take_tickets
from cuda_kernels.tuning import tuning

BN, BK = 64, 64  # as in gemm.cu


def supports(x: Tensor, weight: Tensor) -> str | None:
    """Say why x [rows, K] times int8 weight [N, K] cannot be taken; None where it can."""
    if reason := unfit(x):
        return reason
    if not weight.is_contiguous():
        return "strided weights"
    if len(x) > tuning(x.device).gemm_rows:
        return f"{len(x)} rows"
    if x.shape[1] % BK or weight.shape[0] % 4:
        return f"{x.shape[1]} inputs and {weight.shape[0]} outputs"
    return None


def linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    *,
    bias: Tensor | None = None,
    activation: Activation | None = None,
    splits: int | None = None,
) -> Tensor:
    """Return x [rows, K] times the transpose of weight [N, K] int8 with scale [N], plus bias [N]; sums in float32.

    Args:
        activation: The first half of the N outputs is a gate: act(gate) * up comes out, [rows, N / 2].
        splits: Parts of K at most, instead of what fills the device.
    """
    rows, gated = len(x), activation is not None
    out = x.new_empty(rows, len(weight) // (2 if gated else 1))
    tile = 16 if rows <= 16 else 32 if rows <= 32 else 64
    blocks = math.prod(_grid(out, -(-rows // tile), gated=gated))
    span, parts = split(x.shape[1] // BK, splits or choose_splits(blocks, device_of(x.device)))
    shared = None
    if parts > 1:
        partial = x.new_empty(parts, rows, len(weight), dtype=torch.float32)
        shared = partial, take_tickets(x.device, blocks), span
    grouped_linear(x, weight, scale, bias, None, out, tile=tile, top_k=1, activation=activation, shared=shared)
    return out


def split(steps: int, wanted: int) -> tuple[int, int]:
    """Return the steps of each part and how many parts there are, none of them empty."""
    span = -(-steps // min(steps, wanted))
    return span, -(-steps // span)


def choose_splits(blocks: int, device: Device) -> int:
    """Split the inputs where `blocks` are too few to fill the device."""
    return max(1, device.tuning.waves * device.multiprocessors // blocks)


def grouped_linear(
    x: Tensor,
    weights: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    tiles: tuple[Tensor, Tensor] | None,
    out: Tensor,
    *,
    tile: int,
    top_k: int,
    activation: Activation | None,
    shared: tuple[Tensor, Tensor, int] | None = None,
) -> None:
    """Multiply tiles of `tile` rows, see gemm.cu.

    Args:
        tiles: Order and expert per tile, from `moe`; None for one weight.
        shared: Sums of the parts of K, tickets, and the steps of a part; None where no blocks share K.
    """
    inputs, gated, int8 = x.shape[1], activation is not None, scales is not None
    stage_bytes = tile * BK * 2 + BN * BK * (1 if int8 else 2)
    own = tuning(x.device)
    stages = (own.gemm_bytes if tiles is None else own.expert_bytes) // stage_bytes
    launched = kernel(
        "gemm.cu", "grouped_linear", BM=tile, INT8=int(int8), GATED=int(gated), GELU=int(activation == "gelu_tanh"),
        STAGES=stages, SPLIT=int(shared is not None), IO_FP16=io_define(x.dtype) or 0,
    )  # fmt: skip
    order, tile_expert = tiles or (None, None)
    partial, tickets, span = shared or (None, None, inputs // BK)
    grid = _grid(out, -(-len(x) // tile) if tile_expert is None else len(tile_expert), gated=gated)
    launched(
        (*grid, 1 if partial is None else len(partial)), (128, 1, 1), stages * stage_bytes + tile * 8,
        x, weights, scales, bias, order, tile_expert, partial, tickets, out,
        len(x), out.shape[1], inputs, x.stride(0), top_k, span,
    )  # fmt: skip


def _grid(out: Tensor, tiles: int, *, gated: bool) -> tuple[int, int]:
    return -(-out.shape[1] // (BN // 2 if gated else BN)), tiles
