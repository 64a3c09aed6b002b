"""Experts on a CPU."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from cpu_kernels.act import ACTIVATIONS
from cpu_kernels.blocks import Kind, code_of
from cpu_kernels.library import DTYPES, empty, kernels, unfit


def supports_route(logits: Tensor, _: int) -> str | None:
    """Return why logits [S, E] cannot be taken; None if they can."""
    return unfit(logits) or (None if logits.is_contiguous() else "strided rows")


def supports(x: Tensor) -> str | None:
    """Return why x [S, H] cannot be taken; None if it can."""
    return unfit(x)


def route(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return the renormalised weights, float32, and the ids of the top_k experts, both [S, top_k]."""
    tokens, experts = logits.shape
    weights, ids = empty((tokens, top_k), torch.float32), empty((tokens, top_k), torch.int64)
    kernels()["route"](logits, weights, ids, DTYPES[logits.dtype], tokens, experts, top_k)
    return weights, ids


def moe(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    gate_up: Tensor,
    down: Tensor,
    load: Tensor,
    width: int,
    stored: tuple[Kind, Kind],
    kind: Literal["silu", "gelu_tanh"],
    scales: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Run each token of x [S, H] through its experts and add up.

    Args:
        weights, ids: [S, top_k]; a negative id is no expert's.
        gate_up, down: Packed, from [E, 2 * width, H] and [E, H, width] of the kinds `stored`.
        load: [E] int64, increased by the tokens that each expert gets.
        scales: [E, 2 * width] and [E, H] float32 of int8 weights.
    """
    (tokens, hidden), top_k = x.shape, ids.shape[1]
    inner, outer = empty((tokens * top_k, width), x.dtype), empty((tokens * top_k, hidden), x.dtype)
    out = empty((tokens, hidden), x.dtype)
    kernels()["moe"](
        x, weights.float(), ids.contiguous(), gate_up, down, *(scales or (None, None)), load, inner, outer, out,
        DTYPES[x.dtype], *map(code_of, stored), x.stride(0), tokens, top_k, len(load), hidden, width, ACTIVATIONS[kind],
    )  # fmt: skip
    return out
