"""Linear layers of a few rows on a GPU: weights are streamed once, the norm before and the activation with them."""

from __future__ import annotations

import torch
from torch import Tensor

from cuda_kernels.act import Activation
from cuda_kernels.launch import io_define, kernel, unfit
from cuda_kernels.paged_attn import Device, device_of
from cuda_kernels.tuning import tuning

MAX_ROWS = 8
MAX_SCALAR_ROWS = 2  # of 16-bit weights; more, and two of int8, are multiplied on tensor cores
WARPS, OUTPUTS = 4, 2
AHEAD_BYTES = 8 * 16 * 32  # of a warp's weights in flight
TENSOR_WARPS, TILE, PADDING = 8, 16, 32


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


def supports_norm(x: Tensor, residual: Tensor | None, norm: Tensor, weight: Tensor) -> str | None:
    """Say why the product of normalised rows x [rows, K] cannot be taken in one launch; None where it can."""
    if reason := supports(x, weight):
        return reason
    if x.nbytes > tuning(x.device).prologue_bytes:
        return f"{len(x)} rows of {x.shape[1]}"
    given = (norm,) if residual is None else (norm, residual)
    return None if all(one.is_contiguous() and unfit(one) is None for one in given) else "a strided residual"


def linear(
    x: Tensor,
    weight: Tensor,
    *,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    activation: Activation | None = None,
) -> Tensor:
    """Return x times the weight's transpose, then the epilogue; all sums in float32.

    Args:
        x: [rows, K], at most MAX_ROWS.
        weight: [N, K] in x's dtype, or int8 with `scale` [N] in x's dtype.
        bias: [N].
        activation: The first half of the N outputs is a gate: act(gate) * up comes out, [rows, N / 2].
    """
    return _launch(x, None, None, 0.0, None, weight, scale, bias, activation)


def normed_linear(
    x: Tensor,
    residual: Tensor | None,
    norm: Tensor,
    eps: float,
    weight: Tensor,
    *,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    activation: Activation | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `linear` of RMSNorm(x + residual) times norm [K], and x + residual [rows, K] (x, where it is None)."""
    total = x if residual is None else torch.empty_like(residual)
    return _launch(x, residual, norm, eps, total, weight, scale, bias, activation), total


def shares(weight: Tensor, outputs: int, device: Device) -> bool:
    """Return whether warps share the inputs: blocks are few, and a warp has more of a row than it keeps in flight."""
    few = -(-outputs // (WARPS * OUTPUTS)) < device.tuning.waves * device.multiprocessors
    return few and weight[0].nbytes * len(weight) // outputs * OUTPUTS > AHEAD_BYTES


def _launch(
    x: Tensor,
    residual: Tensor | None,
    norm: Tensor | None,
    eps: float,
    total: Tensor | None,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    activation: Activation | None,
) -> Tensor:
    rows, inputs = x.shape
    gated = activation is not None
    outputs = len(weight) // (2 if gated else 1)
    out = x.new_empty(rows, outputs)
    on_tensor_cores = rows > (MAX_SCALAR_ROWS if scale is None else 1)
    most, warps, padding = (MAX_ROWS, TENSOR_WARPS, PADDING) if on_tensor_cores else (rows, WARPS, 0)
    shared = not on_tensor_cores and shares(weight, outputs, device_of(x.device))
    of_block = (TILE // 2 if gated else TILE) if on_tensor_cores else OUTPUTS if shared else WARPS * OUTPUTS
    launched = kernel(
        "gemv.cu", "gemv", M=most, SHARED=int(shared), INT8=int(scale is not None), GATED=int(gated),
        GELU=int(activation == "gelu_tanh"), NORM=int(norm is not None), IO_FP16=io_define(x.dtype) or 0,
    )  # fmt: skip
    launched(
        (-(-outputs // of_block), 1, 1), (warps * 32, 1, 1),
        0 if norm is None else rows * (inputs + padding) * x.element_size() + warps * 4,
        x, residual, norm, weight, scale, bias, total, out, rows, outputs, inputs, x.stride(0), eps,
    )  # fmt: skip
    return out
