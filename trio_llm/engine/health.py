"""Whether the engine serves: judged from what the scheduler last reported, without asking anybody."""

from __future__ import annotations

from typing import Literal

import attrs

Status = Literal["ok", "stalled", "failing", "draining", "dead"]

# So many steps in a row in which every request failed are the model's fault, not the requests'. Out of the air.
FAILING_AFTER_STEPS = 16


@attrs.frozen
class Health:
    """Whether requests are served. Only "ok" is healthy; `reason` says why it is not, for the operator's log."""

    status: Status
    reason: str | None = None
    num_running: int = 0
    num_waiting: int = 0


@attrs.define
class Pulse:
    """What the scheduler reports of itself; it alone writes, everybody may read.

    Attributes:
        progress_s: When a step last finished while there was work, or when work came to an idle engine
            (Trio's clock); None while there is no work.
        failed_steps: Steps in a row in which every request failed.
    """

    progress_s: float | None = None
    failed_steps: int = 0
    num_running: int = 0
    num_waiting: int = 0

    def stalled_s(self, now_s: float) -> float:
        """Return for how long there has been work without a finished step."""
        return 0.0 if self.progress_s is None else now_s - self.progress_s
