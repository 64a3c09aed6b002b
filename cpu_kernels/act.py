"""Gated activations on a CPU."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from cpu_kernels.library import DTYPES, empty, kernels, unfit

ACTIVATIONS = {None: 0, "silu": 1, "gelu_tanh": 2}  # codes of common.h


def supports(gate_up: Tensor) -> str | None:
    """Return why gate_up [S, 2I] cannot be taken; None if it can."""
    return unfit(gate_up) or (None if gate_up.dim() == 2 else f"{gate_up.dim()} dimensions")


def act_and_mul(gate_up: Tensor, kind: Literal["silu", "gelu_tanh"]) -> Tensor:
    """Return act(gate) * up [S, I] for gate_up [S, 2I], gate first; in float32 until it is stored."""
    rows, width = len(gate_up), gate_up.shape[1] // 2
    out = empty((rows, width), gate_up.dtype)
    kernels()["act"](gate_up, out, DTYPES[gate_up.dtype], rows, width, gate_up.stride(0), ACTIVATIONS[kind])
    return out
