"""Random numbers by counting: the noise of (seed, position, token) is a hash of the three, and of nothing else.

There is no state and no order of drawing, so a sampled token cannot depend on batch mates, the row's index, the number
of candidates or a repeated step. Every device computes the same integers.

Letters: R rows, C candidates, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix64(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Finalise as splitmix64 does. Source: Steele, Lea and Flood 2014, and Stafford's "Mix13" constants."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def row_keys(seeds: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.int32]:
    """Return [R, 2]: an offset and an odd factor for each row's token hashes."""
    keys = _mix64(_mix64(seeds + _GOLDEN) + positions.astype(np.uint64) * _GOLDEN)
    pairs = keys.view(np.uint32).reshape(-1, 2) | np.array([0, 1], np.uint32)
    return pairs.view(np.int32)


def token_hashes(vocab_size: int) -> Tensor:
    """Return [V] int32, one well-mixed integer per token id (so neighbours are uncorrelated)."""
    hashes = _mix64(np.arange(1, vocab_size + 1, dtype=np.uint64) * _GOLDEN)
    return torch.from_numpy((hashes >> np.uint64(32)).astype(np.uint32).view(np.int32))


def uniform(keys: Tensor, hashes: Tensor) -> Tensor:
    """Return float32 in (0, 1), for keys [R, 2] and token hashes [C] or [R, C].

    Small values keep their full relative precision (steps of 2^-31): they decide which token is sampled.
    """
    h = (hashes ^ keys[:, :1]).mul_(keys[:, 1:])
    shifted = torch.empty_like(h)
    for bits, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39), (15, 1)):
        # torch's >> repeats the sign bit; the mask makes zeros of it.
        torch.bitwise_right_shift(h, bits, out=shifted).bitwise_and_((1 << (32 - bits)) - 1)
        h.bitwise_xor_(shifted)
        if factor != 1:
            h.mul_(factor)
    u = shifted.view(torch.float32).copy_(h.bitwise_and_(0x7FFFFFFF))
    return u.add_(0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)


def add_gumbel(scores: Tensor, keys: Tensor, hashes: Tensor) -> Tensor:
    """Add Gumbel noise to scores: the argmax of the result is a sample from softmax(scores).

    Args:
        scores: [R, C] float32 log-weights, -inf for tokens that may not be sampled.
        keys: [R, 2] from `row_keys`.
        hashes: [C] or [R, C], the candidates' entries of `token_hashes`.
    Returns:
        [R, C] float32.
    Source: score - log(E), E exponential, is the Gumbel-max trick (Gumbel 1954; Maddison et al. 2014, arXiv:1411.0030).
    """
    exponential = uniform(keys, hashes).neg_().log1p_().neg_()
    return exponential.log_().neg_().add_(scores)
