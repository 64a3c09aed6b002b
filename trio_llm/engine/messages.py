"""Messages within this floor: from clients to the scheduler, and to metrics."""

from __future__ import annotations

from typing import Literal

import attrs

from trio_llm.engine.mailbox import Mailbox
from trio_llm.engine.request_times import RequestTimes
from trio_llm.messages import BlockStats, FinishReason, StepStats
from trio_llm.params import Submission

# --- client -> scheduler -----------------------------------------------------------------------------------------


@attrs.frozen
class Submit:
    """An accepted request; its parameters are final.

    Attributes:
        times: Its arrival; the scheduler actor adds the others.
        mailbox: For everything that the request produces.
    """

    request_id: int
    submission: Submission
    times: RequestTimes
    mailbox: Mailbox


@attrs.frozen
class Abort:
    """Ends a request early. Unknown and ended ids are ignored.

    `reason` is "stop" if a stop string ended it (the client's task finds it), "abort" if the client left. With
    `tells`, its reader still waits and gets a Finished.
    """

    request_id: int
    reason: FinishReason = "abort"
    tells: bool = False


# --- anyone -> metrics -------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class RequestStats:
    """Statistics of an ended request. Durations are in seconds, None if it did not get that far.

    Attributes:
        reason: Why it ended; "error" if it failed.
        corrupted: It failed because its logits or its embedding were not finite.
        n: Number of samples of its prompt; None for the second sample and later ones.
        siblings_max_tokens: Most tokens over all samples of this prompt; None while one of them still runs.
        num_cached_tokens: Prompt tokens that came from the prefix cache.
        queue_s: Arrival to first step. prefill_s: First step to first token. decode_s: First token to last.
        e2e_s: Arrival to end.
    """

    request_id: int
    reason: FinishReason | Literal["error"]
    corrupted: bool
    n: int | None
    siblings_max_tokens: int | None
    max_tokens: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_generated_tokens: int
    num_preemptions: int
    num_accepted_drafts: int
    queue_s: float | None
    prefill_s: float | None
    decode_s: float | None
    e2e_s: float


@attrs.frozen(kw_only=True)
class StepReport:
    """One step and its effects on requests.

    Attributes:
        request_ids: The rows.
        at_s: Time of the result, on Trio's clock.
        own_s: Time since the previous result that was spent outside the model; None after idleness.
        prompt_tokens, cached_tokens: Of the requests whose prompt was completed by this step.
        first_token_s: Arrival to first token, one entry per request that got its first token.
        inter_token_s: Time since the previous tokens, one entry per other request that got tokens.
        ended: Requests that ended since the last report.
    """

    stats: StepStats
    request_ids: tuple[int, ...]
    at_s: float
    own_s: float | None
    prompt_tokens: int
    cached_tokens: int
    first_token_s: tuple[float, ...]
    inter_token_s: tuple[float, ...]
    ended: tuple[RequestStats, ...]


@attrs.frozen
class IdleReport:
    """The gauges when no step was planned, and requests that ended without one."""

    num_running: int
    num_waiting: int
    blocks: BlockStats | None
    ended: tuple[RequestStats, ...]


@attrs.frozen
class Rejected:
    """A request refused at admission, and why: a fixed word, never a client's text."""

    reason: Literal["overloaded", "draining"]


Report = StepReport | IdleReport | Rejected
