"""Largest logits of each row, found through the maxima of blocks of the vocabulary.

torch walks a row element by element in argmax and topk; one vectorised pass over blocks of 64 leaves little to
walk (Zen 4, [32, 151936] float32: argmax 5.5 -> 0.9 ms, the 65 largest 7.1 -> 2.9 ms).

Letters: R rows, V vocabulary, C candidates.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_WIDTH = 64


class Extremes:
    """The largest entries of logits [R, V]. NaN counts as larger than everything, as in torch.

    Attributes:
        top: [R], each row's largest logit.
    """

    def __init__(self, logits: Tensor) -> None:
        padding = -logits.shape[1] % _WIDTH
        padded = F.pad(logits, (0, padding), value=-torch.inf) if padding else logits
        self._size = logits.shape[1]
        self._blocks = padded.unflatten(1, (-1, _WIDTH))
        self._maxima = self._blocks.amax(-1)
        self.top = self._maxima.amax(-1)

    def argmax(self) -> Tensor:
        """Return [R] int64, ids of the largest logits; the lowest id where several are equal."""
        block = self._maxima.argmax(-1)
        inside = self._blocks[torch.arange(len(block), device=block.device), block].argmax(-1)
        return block * _WIDTH + inside

    def largest(self, count: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return values [n, C] and ids [n, C] of the C = min(count, V) largest logits of some rows, largest first.

        Which of several equal logits make it is not specified: the count largest values are.
        """
        count = min(count, self._size)
        if count >= self._maxima.shape[1]:
            values, ids = self._blocks[rows].flatten(1)[:, : self._size].topk(count, dim=-1)
            return values, ids
        # The C largest lie in the C blocks with the largest maxima.
        blocks = self._maxima[rows].topk(count, dim=-1, sorted=False).indices
        values, inside = self._blocks[rows[:, None], blocks].flatten(1).topk(count, dim=-1)
        return values, (blocks.gather(1, inside // _WIDTH) * _WIDTH + inside % _WIDTH).clamp_(max=self._size - 1)
