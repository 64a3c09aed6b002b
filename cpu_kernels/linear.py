"""Packed weights on a CPU, and the products and lookups that read them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from cpu_kernels import weight_memory
from cpu_kernels.act import ACTIVATIONS
from cpu_kernels.blocks import Kind, code_of
from cpu_kernels.library import DTYPES, empty, kernels, loaded, unfit


def supports(x: Tensor) -> str | None:
    """Return why rows x [S, K] cannot be multiplied; None if they can."""
    return unfit(x) or (None if x.dim() == 2 else f"{x.dim()} dimensions")


def pack(weight: Tensor, kind: Kind | None = None) -> Tensor:
    """Lay out weight [..., N, K] (float32, bfloat16, float16 or int8) for the kernels; return bytes [..., *].

    Args:
        kind: The weight's dtype, or "int8_exact"; default: its dtype.
    """
    *leading, outputs, inputs = weight.shape
    code = code_of(kind or weight.dtype)
    packed = weight_memory.empty((*leading, loaded().packed_bytes(outputs, inputs, code)))
    parts = weight.reshape(-1, outputs, inputs)
    for part, out in zip(parts, packed.view(len(parts), -1), strict=True):
        kernels()["pack"](part.contiguous(), out, outputs, inputs, code)
    return packed


def linear(
    x: Tensor,
    packed: Tensor,
    shape: tuple[int, int],
    kind: Kind,
    *,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    activation: Literal["silu", "gelu_tanh"] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return x times the weight's transpose, then the epilogue; sums in float32.

    Args:
        x: [S, K].
        packed: Of `pack` or `pack_blocks`, from a weight of `shape` [N, K] and `kind`.
        scale, bias: [N] float32.
        activation: The first half of the N outputs is a gate: act(gate) * up comes out, [S, N / 2].
        out: Memory for the result, of x's dtype or float32, dense: rounded to x's dtype all the same.
    """
    outputs, inputs = shape
    if out is None:
        out = empty((len(x), outputs // 2 if activation else outputs), x.dtype)
    kernels()["linear"](
        x, packed, scale, bias, out, DTYPES[x.dtype], DTYPES[out.dtype], DTYPES[x.dtype], x.stride(0), len(x), outputs,
        inputs, code_of(kind), ACTIVATIONS[activation],
    )  # fmt: skip
    return out


def embed(
    ids: Tensor,
    packed: Tensor,
    shape: tuple[int, int],
    kind: Kind,
    scale: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Return the weight's rows [..., K] for ids [...] int64, in `out_dtype`: the weight's unless it is quantised."""
    flat = ids.reshape(-1)
    out = empty((len(flat), shape[1]), out_dtype)
    kernels()["embed"](flat, packed, scale, out, len(flat), *shape, code_of(kind), DTYPES[out_dtype])
    return out.view(*ids.shape, shape[1])
