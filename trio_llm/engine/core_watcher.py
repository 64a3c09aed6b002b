"""What sees every call of the core besides the scheduler actor."""

from __future__ import annotations

from typing import Protocol

from trio_llm.engine.messages import RequestStats
from trio_llm.messages import BlockAsk, BlockGrant, Commit, FinishReason, StepPlan, StepResult
from trio_llm.params import Submission


class CoreWatcher(Protocol):
    """Is called right after each call of the core, in the scheduler actor's task. Must be fast and not raise.

    Times are in seconds, on Trio's clock.
    """

    def arrived(self, request_id: int, submission: Submission, at_s: float) -> None:
        """See a submission; `at_s` is when its client made it."""
        ...

    def left(self, request_id: int, reason: FinishReason, at_s: float) -> None:
        """See an abort. The request may have ended before."""
        ...

    def planned(
        self, at_s: float, prompt_tokens: int | None, ask: BlockAsk, grant: BlockGrant, plan: StepPlan | None
    ) -> None:
        """See ask, reserve and plan; `prompt_tokens` is the argument of `ask`."""
        ...

    def committed(self, at_s: float, result: StepResult, commit: Commit) -> None:
        """See a commit."""
        ...

    def ended(self, stats: RequestStats) -> None:
        """See the statistics of an ended request, soon after its end."""
        ...
