"""Largest logits of each row, without walking the vocabulary element by element as torch does on a CPU.

Measured on Zen 4, [32, 151936] float32, two threads: torch argmax 5.5 ms, numpy's 1.2; topk of the 65 largest 7.1 ms,
through the maxima of blocks 2.9.

Letters: R rows, V vocabulary, C candidates.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_WIDTH = 64


def argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return ids [R] int64 and values [R] of the largest logits [R, V]; the lowest id where several are equal.

    NaN counts as larger than everything.
    """
    if logits.is_cpu:
        rows = logits.numpy()
        ids = rows.argmax(axis=1)
        return torch.from_numpy(ids), torch.from_numpy(rows[np.arange(len(ids)), ids])
    return argmax_of_blocks(logits)


def argmax_of_blocks(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Do the same on any device."""
    blocks, maxima = _blocks(logits)
    block = maxima.argmax(-1)
    inside = blocks[torch.arange(len(block), device=block.device), block].argmax(-1)
    return block * _WIDTH + inside, maxima.amax(-1)


def largest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return values [R, C] and ids [R, C] of the C = min(count, V) largest logits [R, V], largest first.

    Which of several equal logits are among them is unspecified.
    """
    size = logits.shape[1]
    count = min(count, size)
    blocks, maxima = _blocks(logits)
    if count >= maxima.shape[1]:
        values, ids = logits.topk(count, dim=-1)
        return values, ids
    # The C largest are in the C blocks with the largest maxima.
    chosen = maxima.topk(count, dim=-1, sorted=False).indices
    rows = torch.arange(len(logits), device=logits.device)[:, None]
    values, inside = blocks[rows, chosen].flatten(1).topk(count, dim=-1)
    # Padding is at -inf. If it is among the largest, so is a real token at -inf, and neither can be drawn.
    return values, (chosen.gather(1, inside // _WIDTH) * _WIDTH + inside % _WIDTH).clamp_(max=size - 1)


def _blocks(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return [R, N, W], padded with -inf, and the maxima [R, N]."""
    padding = -logits.shape[1] % _WIDTH
    blocks = (F.pad(logits, (0, padding), value=-torch.inf) if padding else logits).unflatten(1, (-1, _WIDTH))
    return blocks, blocks.amax(-1)
