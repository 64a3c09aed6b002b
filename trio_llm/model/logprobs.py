"""Log-probabilities as clients see them: the chosen token, its rank and the likeliest others.

Letters: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trio_llm.messages import TokenLogprobs
from trio_llm.model.extremes import largest


def gather_logprobs(logprobs: Tensor, token_ids: Sequence[int], nums: Sequence[int]) -> list[TokenLogprobs]:
    """Describe one token per row.

    Args:
        logprobs: [R, V] float32.
        token_ids: R chosen tokens.
        nums: R times, how many of the likeliest tokens to name; V for all.
    """
    chosen = torch.tensor(token_ids, device=logprobs.device)[:, None]
    values = logprobs.gather(1, chosen)
    ranks = (logprobs > values).sum(-1, dtype=torch.int32).add_(1).tolist()
    top = _likeliest(logprobs, max(nums))
    return [
        TokenLogprobs(token_id, value, rank, tuple(row[:num]))
        for token_id, value, rank, row, num in zip(token_ids, values[:, 0].tolist(), ranks, top, nums, strict=True)
    ]


def _likeliest(logprobs: Tensor, count: int) -> list[list[tuple[int, float]]]:
    """Return per row (token id, logprob) of the `count` likeliest, the lowest id first where several are equal."""
    if count == 0:
        return [[] for _ in logprobs]
    values, ids = largest(logprobs, count)
    rows = zip(ids.tolist(), values.tolist(), strict=True)
    return [sorted(zip(*row, strict=True), key=lambda entry: (-entry[1], entry[0])) for row in rows]
