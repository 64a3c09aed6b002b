"""Health of the engine, from what the scheduler last reported."""

from __future__ import annotations

from typing import Literal

import attrs

Status = Literal["ok", "stalled", "failing", "draining", "dead"]

# After this many consecutive steps in which every request failed, the model is at fault, not the requests. A guess.
FAILING_AFTER_STEPS = 16
# With work but no finished step for this long, the engine is stalled. A guess, longer than any step seen.
STALL_AFTER_S = 60.0
# The same for the first step, which may read the weights from a slow disk and compile kernels. A guess.
FIRST_STALL_AFTER_S = 600.0


@attrs.frozen
class Health:
    """Health of the engine. Only "ok" is healthy; otherwise `reason` says why, for the operator's log."""

    status: Status
    reason: str | None = None
    num_running: int = 0
    num_waiting: int = 0


@attrs.define
class Pulse:
    """The state that the scheduler reports. Only the scheduler writes it; anyone may read it.

    Attributes:
        stall_after_s: Seconds without a finished step after which the engine is stalled.
        first_stall_after_s: The same until the first step since the start has finished.
        progress_s: When a step last finished, or when work arrived at an idle engine, on Trio's clock. None while there
            is no work.
        has_stepped: A step has finished since the start.
        failed_steps: Consecutive steps in which every request failed.
    """

    stall_after_s: float = STALL_AFTER_S
    first_stall_after_s: float = FIRST_STALL_AFTER_S
    progress_s: float | None = None
    has_stepped: bool = False
    failed_steps: int = 0
    num_running: int = 0
    num_waiting: int = 0

    def stalled_s(self, now_s: float) -> float:
        """Return how long there has been work without a finished step; 0 if that is not too long."""
        waiting_s = 0.0 if self.progress_s is None else now_s - self.progress_s
        return waiting_s if waiting_s > (self.stall_after_s if self.has_stepped else self.first_stall_after_s) else 0.0
