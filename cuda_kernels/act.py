"""Gated activations on a GPU."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from cuda_kernels.launch import io_define, kernel, unfit

THREADS = 256

Activation = Literal["silu", "gelu_tanh"]


def supports(gate_up: Tensor) -> str | None:
    """Say why gate_up [S, 2I] cannot be taken; None where it can."""
    if reason := unfit(gate_up):
        return reason
    if gate_up.shape[-1] % 16:
        return f"width {gate_up.shape[-1]}"
    return None


def act_and_mul(gate_up: Tensor, kind: Activation) -> Tensor:
    """Return act(gate) * up [S, I] for gate_up [S, 2I], gate first; in float32 until it is stored."""
    rows, width = len(gate_up), gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    launched = kernel("act.cu", "act_and_mul", GELU=int(kind == "gelu_tanh"), IO_FP16=io_define(gate_up.dtype) or 0)
    pieces = -(-width // (8 * THREADS))
    launched((rows, pieces, 1), (THREADS, 1, 1), 0, gate_up, out, width, gate_up.stride(0))
    return out
