"""Mixture of experts on a GPU: route, sort, grouped products, sum."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from cuda_kernels.launch import Kernel, io_define, kernel, unfit

MAX_EXPERTS = 512
MAX_TOP_K = 32
_BN, _BK, _STAGES = 64, 64, 3  # as in moe.cu


def supports(x: Tensor, gate_up: Tensor, down: Tensor) -> str | None:
    """Say why x [S, H] and experts [E, 2I, H], [E, H, I] cannot be taken; None where they can."""
    if reason := unfit(x):
        return reason
    if gate_up.dtype != x.dtype or down.dtype != x.dtype:
        return f"weights of {gate_up.dtype}"
    if len(gate_up) > MAX_EXPERTS:
        return f"{len(gate_up)} experts"
    if down.shape[1] % _BK or down.shape[2] % _BK:
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
    """Return weights [S, top_k] float32 and ids [S, top_k] int64 of the likeliest experts; the weights sum to 1."""
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
    kind: Literal["silu", "gelu_tanh"],
) -> Tensor:
    """Run each token through its experts and add up.

    Args:
        x: [S, H].
        weights, ids: [S, top_k] float32 and int64.
        gate_up, down: [E, 2I, H], gate first, and [E, H, I].
        load: [E] int64, increased by the tokens each expert gets.
    """
    tokens, top_k = ids.shape
    experts, hidden, width = down.shape
    pairs = tokens * top_k
    rows = 16 if pairs <= 16 * experts else 64  # by the tokens an expert can expect (guessed)
    tiles = -(-pairs // rows) + min(experts, pairs)
    order, tile_expert = ids.new_empty(tiles * rows, dtype=torch.int32), ids.new_empty(tiles, dtype=torch.int32)
    sort = _kernel("sort_pairs", x, rows=rows, experts=experts)
    sort((1, 1, 1), (1024, 1, 1), (2 * experts + 1) * 4, ids, order, tile_expert, load, pairs, tiles)
    shared_bytes = _STAGES * (rows + _BN) * _BK * 2 + rows * 4
    inner, outer = x.new_empty(pairs, width), x.new_empty(pairs, hidden)
    for source, matrix, result, gated in ((x.contiguous(), gate_up, inner, 1), (inner, down, outer, 0)):
        launched = _kernel("expert_linear", x, rows=rows, gated=gated, gelu=int(kind == "gelu_tanh" and gated))
        columns, inputs = result.shape[1], source.shape[1]
        grid = (-(-columns // (_BN // 2 if gated else _BN)), tiles, 1)
        launched(grid, (128, 1, 1), shared_bytes, source, matrix, order, tile_expert, result, columns, inputs, top_k)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    add_up = _kernel("combine", x)
    add_up((tokens, -(-hidden // 1024), 1), (128, 1, 1), 0, outer, weights.contiguous(), out, hidden, top_k)
    return out


def _kernel(
    entry: str, x: Tensor, *, rows: int = 16, gated: int = 0, gelu: int = 0, experts: int = 8, top_k: int = 1
) -> Kernel:
    """Return an entry point; what it does not use keeps a default, so that equal modules are built once."""
    return kernel(
        "moe.cu", entry, BM=rows, GATED=gated, GELU=gelu, NUM_EXPERTS=experts, TOP_K=top_k,
        IO_FP16=io_define(x.dtype) or 0,
    )  # fmt: skip
