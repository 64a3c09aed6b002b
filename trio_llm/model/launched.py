"""A step whose work is queued, and how its result is put together once the device is done.

Letters: R rows sampled in the step.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
from torch import Tensor

from trio_llm.messages import KernelCall, StepPlan, StepResult, TokenLogprobs
from trio_llm.model.device import Mark
from trio_llm.model.sampler import FAILURES, Sampled


@attrs.frozen(eq=False)
class Launched:
    """What a step left behind on the host; its tensors hold what they should once `done` has passed.

    Attributes:
        sampled: Of the rows that stand at `sampled_at` in the batch, R of them; None if none sampled.
        experts: Tokens that each expert was given; None without experts.
        failed: Rows that failed when the step was launched.
        calls: What its operations ran on.
    """

    plan: StepPlan
    sampled_at: Sequence[int]
    sampled: Sampled | None
    experts: Tensor | None
    prompt_logprobs: dict[int, tuple[TokenLogprobs | None, ...]] | None
    embeddings: dict[int, tuple[float, ...]] | None
    failed: dict[int, str]
    calls: tuple[KernelCall, ...] | None
    began: Mark
    done: Mark

    def collect(self) -> StepResult:
        """Wait for the device and return the result. Queues no work, so any thread may call it."""
        self.done.wait()
        failed = dict(self.failed)
        return StepResult(
            self.plan.step,
            self._token_ids(failed),
            self._logprobs(),
            self.prompt_logprobs,
            self.embeddings,
            failed,
            self.done.seconds_since(self.began),
            None if self.experts is None else tuple(self.experts.tolist()),
            self.calls,
        )

    def _token_ids(self, failed: dict[int, str]) -> tuple[tuple[int, ...], ...]:
        token_ids: list[tuple[int, ...]] = [()] * len(self.plan.request_ids)
        sampled = [] if self.sampled is None else self.sampled.token_ids.tolist()
        for i, token_id in zip(self.sampled_at, sampled, strict=True):
            if token_id >= 0:
                token_ids[i] = (token_id,)
            else:
                failed[self.plan.request_ids[i]] = FAILURES[token_id]
        return tuple(token_ids)

    def _logprobs(self) -> tuple[tuple[TokenLogprobs, ...] | None, ...] | None:
        entries = None if self.sampled is None else self.sampled.logprobs()
        if entries is None:
            return None
        logprobs: list[tuple[TokenLogprobs, ...] | None] = [None] * len(self.plan.request_ids)
        for i, entry in zip(self.sampled_at, entries, strict=True):
            logprobs[i] = None if entry is None else (entry,)
        return tuple(logprobs)
