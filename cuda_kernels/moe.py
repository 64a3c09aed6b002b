"""Mixture of experts on a GPU: route, sort, grouped products, sum."""

from __future__ import annotations

import torch
from torch import Tensor

from cuda_kernels.act import Activation
from cuda_kernels.gemm import BK, grouped_linear
from cuda_kernels.launch import Kernel, io_define, kernel, unfit
from cuda_kernels.tuning import tuning

MAX_EXPERTS = 512
MAX_TOP_K = 32


def supports(x: Tensor, gate_up: Tensor, down: Tensor) -> str | None:
    """Say why x [S, H] and experts [E, 2I, H], [E, H, I] cannot be taken; None where they can."""
    if reason := unfit(x):
        return reason
    if gate_up.dtype not in (x.dtype, torch.int8) or down.dtype != gate_up.dtype:
        return f"weights of {gate_up.dtype}"
    if len(gate_up) > MAX_EXPERTS:
        return f"{len(gate_up)} experts"
    if down.shape[1] % BK or down.shape[2] % BK:
        return f"experts of {down.shape[2]} by {down.shape[1]}"
    return None


def supports_route(logits: Tensor, top_k: int) -> str | None:
    """Say why logits [S, E] cannot be routed; None where they can."""
    if io_define(logits.dtype) is None:
        return f"dtype {logits.dtype}"
    if logits.shape[1] > MAX_EXPERTS or top_k > MAX_TOP_K:
        return f"{top_k} of {logits.shape[1]} experts"
    return None


def route(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return weights [S, top_k] float32 and ids [S, top_k] int64 of the most likely experts; the weights sum to 1."""
    tokens, experts = logits.shape
    weights = logits.new_empty(tokens, top_k, dtype=torch.float32)
    ids = logits.new_empty(tokens, top_k, dtype=torch.int64)
    launched = _kernel("route", logits, experts=experts, top_k=top_k)
    launched((-(-tokens // 4), 1, 1), (128, 1, 1), 0, logits.contiguous(), weights, ids, tokens)
    return weights, ids


def moe(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    gate_up: Tensor,
    down: Tensor,
    load: Tensor,
    kind: Activation,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Run each token through its experts and add up.

    Args:
        x: [S, H].
        weights, ids: [S, top_k] float32 and int64. Ids of -1 are of a token that only pads the batch: it is given to no
            expert and counts nowhere; what comes out for it means nothing.
        gate_up, down: [E, 2I, H], gate first, and [E, H, I].
        load: [E] int64, increased by the tokens each expert gets.
        scales: [E, 2I] and [E, H] of int8 weights.
    """
    tokens, top_k = ids.shape
    experts, hidden, width = down.shape
    pairs = tokens * top_k
    rows = 16 if pairs <= tuning(x.device).expert_rows * experts else 64
    tiles = -(-pairs // rows) + min(experts, pairs)
    order, tile_expert = ids.new_empty(tiles * rows, dtype=torch.int32), ids.new_empty(tiles, dtype=torch.int32)
    sort = _kernel("sort_pairs", x, rows=rows, experts=experts)
    sort((1, 1, 1), (1024, 1, 1), (2 * experts + 1) * 4, ids, order, tile_expert, load, pairs, tiles)
    inner, outer = x.new_empty(pairs, width), x.new_empty(pairs, hidden)
    of_gate_up, of_down = scales or (None, None)
    placed = {"tiles": (order, tile_expert), "tile": rows, "top_k": top_k}
    grouped_linear(x, gate_up, of_gate_up, None, out=inner, activation=kind, **placed)
    grouped_linear(inner, down, of_down, None, out=outer, activation=None, **placed)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    add_up = _kernel("combine", x)
    add_up((tokens, -(-hidden // 1024), 1), (128, 1, 1), 0, outer, weights.contiguous(), out, hidden, top_k)
    return out


def _kernel(entry: str, x: Tensor, *, rows: int = 16, experts: int = 8, top_k: int = 1) -> Kernel:
    """Return an entry point; what it does not use keeps a default, so that equal modules are built once."""
    return kernel("moe.cu", entry, BM=rows, NUM_EXPERTS=experts, TOP_K=top_k, IO_FP16=io_define(x.dtype) or 0)
