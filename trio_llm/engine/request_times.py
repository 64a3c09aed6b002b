"""When a request got how far, and with how many drafts."""

from __future__ import annotations

import attrs


@attrs.define(eq=False)
class RequestTimes:
    """Times of one request, on Trio's clock; None until it gets there. Only the scheduler actor writes them.

    Attributes:
        arrived_s: Its submission.
        started_s: The plan of its first step.
        num_drafts, num_accepted_drafts: Its verified drafts, and how many of them were accepted.
    """

    arrived_s: float
    started_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    num_drafts: int = 0
    num_accepted_drafts: int = 0
