"""Log-probabilities as clients see them: the chosen token, its rank and the likeliest others.

Letters: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import attrs
import torch
from torch import Tensor

from trio_llm.messages import TokenLogprobs
from trio_llm.model.ops.dispatch import choose
from trio_llm.model.sampling.top_k import largest


@attrs.frozen(eq=False)
class Scores:
    """Log-probabilities of one token per row and of the K likeliest others.

    Attributes:
        values: [R] float32, the log-probability of the row's token.
        ranks: [R] int32, 1 for the likeliest.
        top_ids, top_values: [R, K], in no particular order.
        named: [R, M] float32, the log-probabilities of tokens that the rows name.
    """

    values: Tensor
    ranks: Tensor
    top_ids: Tensor
    top_values: Tensor
    named: Tensor

    def to_host(self, copy: Callable[[Tensor], Tensor]) -> Scores:
        """Return the same with every tensor copied."""
        some = copy(self.values), copy(self.ranks), copy(self.top_ids), copy(self.top_values), copy(self.named)
        return Scores(*some)

    def describe(
        self, token_ids: Sequence[int], nums: Sequence[int], names: Sequence[tuple[int, ...]]
    ) -> list[TokenLogprobs]:
        """Describe the tokens, `nums` of the likeliest in each row, and the `names` that are none of these.

        Among equally likely tokens the lowest id comes first.
        """
        top = zip(self.top_ids.tolist(), self.top_values.tolist(), strict=True)
        likeliest = [
            sorted(zip(*row, strict=True), key=_likeliest_first)[:num] for row, num in zip(top, nums, strict=True)
        ]
        for row, asked, values in zip(likeliest, names, self.named.tolist(), strict=True):
            if asked:
                row[:] = sorted({*row, *zip(asked, values, strict=False)}, key=_likeliest_first)
        columns = zip(token_ids, self.values.tolist(), self.ranks.tolist(), likeliest, strict=True)
        return [TokenLogprobs(token_id, value, rank, tuple(row)) for token_id, value, rank, row in columns]


def _likeliest_first(entry: tuple[int, float]) -> tuple[float, int]:
    token_id, logprob = entry
    return -logprob, token_id


def score(logprobs: Tensor, token_ids: Tensor, num: int, named: Tensor | None = None) -> Scores:
    """Look up one token per row, the `num` likeliest and `named`, without waiting for the device.

    Args:
        logprobs: [R, V] float32.
        token_ids: [R] int64.
        named: [R, M] int64, more tokens to look up; None for none.
    """
    values = logprobs.gather(1, token_ids[:, None])
    ranks = (logprobs > values).sum(-1, dtype=torch.int32).add_(1)
    if num:
        top_values, top_ids = largest(logprobs, num)
    else:
        top_values, top_ids = logprobs[:, :0], token_ids[:, None][:, :0]
    found = logprobs[:, :0] if named is None else logprobs.gather(1, named)
    return Scores(values[:, 0], ranks, top_ids, top_values, found)


def score_logits(logits: Tensor, token_ids: Tensor, num: int, named: Tensor | None = None) -> Scores:
    """Do the same from raw logits [R, V]; by kernels if they can, which take one or two passes over the logits."""
    kernels = choose("logprobs", logits)
    if kernels is not None:
        return Scores(*kernels.logprobs(logits, token_ids, num, named))
    kernels = None if num or named is not None else choose("token_logprobs", logits)
    if kernels is None:
        return score(logits.log_softmax(-1), token_ids, num, named)
    values, ranks = kernels.token_logprobs(logits, token_ids)
    none = token_ids[:, None][:, :0]
    return Scores(values, ranks, none, none, none)


def describe_logits(logits: Tensor, token_ids: Sequence[int], num: int) -> list[TokenLogprobs]:
    """Describe one token per row and `num` of the likeliest, at once.

    Args:
        logits: [R, V] float32.
    """
    chosen = torch.tensor(token_ids, device=logits.device)
    return score_logits(logits, chosen, num).describe(token_ids, [num] * len(token_ids), [()] * len(token_ids))
