"""Log-probabilities of a few tokens of each row of logits, on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from cpu_kernels.library import empty, kernels


def logprobs(
    logits: Tensor, token_ids: Tensor, num: int, named: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return values [R] and ranks [R] int32 of a token per row, ids and values [R, K] of the likeliest, values [R, M].

    Ranks count larger logits: two that differ by less than a log-probability resolves are not equal. NaN and infinity
    make all values of their row NaN.

    Args:
        logits: [R, V] float32, dense.
        token_ids: [R] int64.
        num: K; at most V are returned.
        named: [R, M] int64, more tokens to look up; None for none.
    """
    rows, vocab_size = logits.shape
    most, names = min(num, vocab_size), 0 if named is None else named.shape[1]
    values, ranks = empty((rows,), torch.float32), empty((rows,), torch.int32)
    top_ids, top_values = empty((rows, most), torch.int64), empty((rows, most), torch.float32)
    found = empty((rows, names), torch.float32)
    own = None if named is None else named.contiguous()
    kernels()["logprobs"](
        logits, token_ids.contiguous(), own, values, ranks, top_ids, top_values, found, rows, vocab_size, most, names
    )
    return values, ranks, top_ids, top_values, found
