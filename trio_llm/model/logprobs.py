"""Log-probabilities as clients see them: the chosen token, its rank and the likeliest others.

In two parts, so that a device is never waited for in between: tensors first, Python objects once they are on the host.

Letters: R rows, V vocabulary, C likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from trio_llm.messages import TokenLogprobs
from trio_llm.model.extremes import largest


@attrs.frozen(eq=False)
class LogprobTensors:
    """One token per row, described by tensors on the logits' device.

    Attributes:
        chosen: [R] float32, the token's log-probability.
        ranks: [R], 1 for the likeliest token.
        values, ids: [R, C], of the likeliest tokens, in no particular order among equals.
    """

    chosen: Tensor
    ranks: Tensor
    values: Tensor
    ids: Tensor

    def on_host(self) -> LogprobTensors:
        """Return the same in host memory, where it may be read once the device has done all work given so far."""
        fields = (self.chosen, self.ranks, self.values, self.ids)
        return LogprobTensors(*(field.to("cpu", non_blocking=True) for field in fields))

    def describe(self, token_ids: Sequence[int], nums: Sequence[int]) -> list[TokenLogprobs]:
        """Put into words what stands in host memory.

        Args:
            token_ids: The R tokens.
            nums: R times, how many of the likeliest tokens to name, at most C.
        """
        likeliest = zip(self.ids.tolist(), self.values.tolist(), strict=True)
        rows = zip(token_ids, self.chosen.tolist(), self.ranks.tolist(), likeliest, nums, strict=True)
        return [
            TokenLogprobs(token_id, value, rank, tuple(_in_order(*top)[:num]))
            for token_id, value, rank, top, num in rows
        ]


def look_up(logprobs: Tensor, token_ids: Tensor, count: int) -> LogprobTensors:
    """Describe one token per row.

    Args:
        logprobs: [R, V] float32.
        token_ids: [R] int64, chosen tokens.
        count: How many of the likeliest tokens to find; V for all.
    """
    chosen = logprobs.gather(1, token_ids[:, None])
    ranks = (logprobs > chosen).sum(-1, dtype=torch.int32).add_(1)
    return LogprobTensors(chosen[:, 0], ranks, *likeliest(logprobs, count))


def likeliest(logprobs: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return values and ids [R, C] of the C = min(count, V) likeliest tokens."""
    if count == 0:  # spares a pass over the vocabulary
        return logprobs[:, :0], torch.empty(len(logprobs), 0, dtype=torch.int64, device=logprobs.device)
    return largest(logprobs, count)


def gather_logprobs(logprobs: Tensor, token_ids: Sequence[int], nums: Sequence[int]) -> list[TokenLogprobs]:
    """Do both parts at once: wait for the device.

    Args:
        logprobs: [R, V] float32.
        token_ids: R chosen tokens.
        nums: R times, how many of the likeliest tokens to name; V for all.
    """
    chosen = torch.tensor(token_ids, device=logprobs.device)
    return look_up(logprobs, chosen, max(nums)).describe(token_ids, nums)


def _in_order(ids: list[int], values: list[float]) -> list[tuple[int, float]]:
    """Return (token id, logprob), the likeliest first, and of several equal ones the lowest id."""
    return sorted(zip(ids, values, strict=True), key=lambda entry: (-entry[1], entry[0]))
