"""Linear layers of more than a few rows on tensor cores: int8 weights, and experts of either kind."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from cuda_kernels.launch import io_define, kernel, unfit
from cuda_kernels.tuning import tuning

BN, BK = 64, 64  # as in gemm.cu

Activation = Literal["silu", "gelu_tanh"]


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
    x: Tensor, weight: Tensor, scale: Tensor, *, bias: Tensor | None = None, activation: Activation | None = None
) -> Tensor:
    """Return x [rows, K] times the transpose of weight [N, K] int8 with scale [N], plus bias [N]; sums in float32.

    Args:
        activation: The first half of the N outputs is a gate: act(gate) * up comes out, [rows, N / 2].
    """
    rows = len(x)
    out = x.new_empty(rows, len(weight) // (1 if activation is None else 2))
    tile = 16 if rows <= 16 else 32 if rows <= 32 else 64
    grouped_linear(x, weight, scale, bias, None, out, tile=tile, top_k=1, activation=activation)
    return out


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
) -> None:
    """Multiply tiles of `tile` rows, see gemm.cu.

    Args:
        tiles: Order and expert per tile, from `moe`; None for one weight.
    """
    columns, inputs = out.shape[1], x.shape[1]
    gated, int8 = activation is not None, scales is not None
    stage_bytes = tile * BK * 2 + BN * BK * (1 if int8 else 2)
    own = tuning(x.device)
    stages = (own.gemm_bytes if tiles is None else own.expert_bytes) // stage_bytes
    launched = kernel(
        "gemm.cu", "grouped_linear", BM=tile, INT8=int(int8), GATED=int(gated), GELU=int(activation == "gelu_tanh"),
        STAGES=stages, IO_FP16=io_define(x.dtype) or 0,
    )  # fmt: skip
    order, tile_expert = tiles or (None, None)
    num_tiles = -(-len(x) // tile) if tile_expert is None else len(tile_expert)
    grid = (-(-columns // (BN // 2 if gated else BN)), num_tiles, 1)
    launched(
        grid, (128, 1, 1), stages * stage_bytes + tile * 8,
        x, weights, scales, bias, order, tile_expert, out, len(x), columns, inputs, x.stride(0), top_k,
    )  # fmt: skip
