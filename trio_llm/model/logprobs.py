"""Log-probabilities as clients see them: the chosen token, its rank and the likeliest others.

Letters: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import attrs
import torch
from torch import Tensor

from trio_llm.messages import TokenLogprobs
from trio_llm.model.dispatch import choose
from trio_llm.model.extremes import largest


@attrs.frozen(eq=False)
class Scores:
    """What is told of one token per row, K likeliest others included.

    Attributes:
        values: [R] float32, the log-probability of the row's token.
        ranks: [R] int32, 1 for the likeliest.
        top_ids, top_values: [R, K], in no order that is promised.
    """

    values: Tensor
    ranks: Tensor
    top_ids: Tensor
    top_values: Tensor

    def to_host(self, copy: Callable[[Tensor], Tensor]) -> Scores:
        """Return the same with every tensor copied."""
        return Scores(copy(self.values), copy(self.ranks), copy(self.top_ids), copy(self.top_values))

    def describe(self, token_ids: Sequence[int], nums: Sequence[int]) -> list[TokenLogprobs]:
        """Name the tokens, and `nums` of the likeliest in each row: the lowest id first where several are equal."""
        top = zip(self.top_ids.tolist(), self.top_values.tolist(), strict=True)
        likeliest = [sorted(zip(*row, strict=True), key=lambda entry: (-entry[1], entry[0])) for row in top]
        columns = zip(token_ids, self.values.tolist(), self.ranks.tolist(), likeliest, nums, strict=True)
        return [TokenLogprobs(token_id, value, rank, tuple(row[:num])) for token_id, value, rank, row, num in columns]


def score(logprobs: Tensor, token_ids: Tensor, num: int) -> Scores:
    """Look up one token per row and the `num` likeliest; nothing waits for a device.

    Args:
        logprobs: [R, V] float32.
        token_ids: [R] int64.
    """
    values = logprobs.gather(1, token_ids[:, None])
    ranks = (logprobs > values).sum(-1, dtype=torch.int32).add_(1)
    if num:
        top_values, top_ids = largest(logprobs, num)
    else:
        top_values, top_ids = logprobs[:, :0], token_ids[:, None][:, :0]
    return Scores(values[:, 0], ranks, top_ids, top_values)


def score_logits(logits: Tensor, token_ids: Tensor, num: int) -> Scores:
    """Do the same from raw logits [R, V]. Where no others are wanted a kernel can, in two passes over them."""
    kernels = None if num else choose("token_logprobs", logits)
    if kernels is None:
        return score(logits.log_softmax(-1), token_ids, num)
    values, ranks = kernels.token_logprobs(logits, token_ids)
    none = token_ids[:, None][:, :0]
    return Scores(values, ranks, none, none)


def gather_logprobs(logprobs: Tensor, token_ids: Sequence[int], num: int) -> list[TokenLogprobs]:
    """Describe one token per row and `num` of the likeliest, at once.

    Args:
        logprobs: [R, V] float32.
    """
    chosen = torch.tensor(token_ids, device=logprobs.device)
    return score(logprobs, chosen, num).describe(token_ids, [num] * len(token_ids))
