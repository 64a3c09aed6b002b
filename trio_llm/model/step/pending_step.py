"""A step whose work is queued, and how its result is put together once the device is done.

Letters: R rows sampled in the step.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
from torch import Tensor

from trio_llm.messages import KernelCall, StepPlan, StepResult, TokenLogprobs
from trio_llm.model.device.device import Mark
from trio_llm.model.sampling.acceptance import accepted_tokens
from trio_llm.model.sampling.sampler import FAILURES, Sampled


@attrs.frozen(eq=False)
class PendingStep:
    """A queued step and its results on the host; the tensors are valid once `done` has passed.

    Attributes:
        sampled: Of the rows at `sampled_at` in the batch; None if no row sampled.
        drafts: Of the same rows, the drafts to verify. Empty without speculative decoding.
        experts: Tokens that each expert was given; None without experts.
        failed: Rows that failed when the step was launched.
        calls: Kernel calls of the step.
        proposed: Per row of the batch, the next drafts of a draft model; None without one.
    """

    plan: StepPlan
    sampled_at: Sequence[int]
    sampled: Sampled | None
    drafts: Sequence[tuple[int, ...]]
    experts: Tensor | None
    prompt_logprobs: dict[int, tuple[TokenLogprobs | None, ...]] | None
    embeddings: dict[int, tuple[float, ...]] | None
    failed: dict[int, str]
    calls: tuple[KernelCall, ...] | None
    proposed: tuple[tuple[int, ...], ...] | None
    began: Mark
    done: Mark

    def collect(self) -> StepResult:
        """Return the result, once `done` has passed. Queues no work, so any thread may call it."""
        failed = dict(self.failed)
        token_ids = self._token_ids(failed)
        return StepResult(
            self.plan.step,
            token_ids,
            self._logprobs(token_ids),
            self.prompt_logprobs,
            self.embeddings,
            failed,
            self.done.seconds_since(self.began),
            None if self.experts is None else tuple(self.experts.tolist()),
            self.calls,
            self.proposed,
        )

    def _token_ids(self, failed: dict[int, str]) -> tuple[tuple[int, ...], ...]:
        token_ids: list[tuple[int, ...]] = [()] * len(self.plan.request_ids)
        sampled = [] if self.sampled is None else self.sampled.token_ids.tolist()
        if not self.drafts and len(sampled) == len(token_ids) and min(sampled, default=0) >= 0:
            return tuple(zip(sampled, strict=True))  # One token for each row, as in most steps: no work per row.
        for i, accepted in zip(self.sampled_at, accepted_tokens(sampled, self._drafts()), strict=True):
            if accepted[0] >= 0:
                token_ids[i] = tuple(accepted)
            else:
                failed[self.plan.request_ids[i]] = FAILURES[accepted[0]]
        return tuple(token_ids)

    def _logprobs(self, token_ids: tuple[tuple[int, ...], ...]) -> tuple[tuple[TokenLogprobs, ...] | None, ...] | None:
        entries = None if self.sampled is None else self.sampled.logprobs()
        if entries is None:
            return None
        logprobs: list[tuple[TokenLogprobs, ...] | None] = [None] * len(self.plan.request_ids)
        at = 0
        for i, draft in zip(self.sampled_at, self._drafts(), strict=True):
            accepted = [entry for entry in entries[at : at + len(token_ids[i])] if entry is not None]
            logprobs[i] = tuple(accepted) or None
            at += len(draft) + 1
        return tuple(logprobs)

    def _drafts(self) -> Sequence[tuple[int, ...]]:
        return self.drafts or [()] * len(self.sampled_at)
