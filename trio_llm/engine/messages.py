"""Messages that stay on this floor: from clients to the scheduler, and from anyone to metrics."""

from __future__ import annotations

from typing import Literal

import attrs
import trio

from trio_llm.messages import BlockStats, Event, FinishReason, PoolingParams, SamplingParams, StepStats

# --- client -> scheduler -----------------------------------------------------------------------------------------


@attrs.frozen
class Submit:
    """An accepted request. `params` are final (seed drawn, max_tokens resolved); `arrived_s` is on Trio's clock.

    `reply` is bounded to what the request can ever produce.
    """

    request_id: int
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams | PoolingParams
    background: bool
    priority: int
    salt: bytes
    leader: int | None
    arrived_s: float
    reply: trio.MemorySendChannel[Event]


@attrs.frozen
class Abort:
    """Nobody wants the rest of this request; unknown and ended ids are ignored.

    `reason` is "stop" where a stop string ended it (found by the client), "abort" where the client left.
    """

    request_id: int
    reason: FinishReason = "abort"


# --- anyone -> metrics -------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class RequestStats:
    """One request that ended, in numbers; durations in seconds, None where it never came so far.

    Attributes:
        reason: Why it ended; "error" where it failed.
        corrupted: It failed because the model's numbers for it were not finite.
        n: Samples that its prompt was to have; None for the second sample and later.
        siblings_max_tokens: Most tokens of all the samples of this prompt, None while one of them still runs.
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
    queue_s: float | None
    prefill_s: float | None
    decode_s: float | None
    e2e_s: float


@attrs.frozen(kw_only=True)
class StepReport:
    """One step and what it meant for requests.

    Attributes:
        request_ids: Its rows.
        at_s: When its result was there, on Trio's clock.
        own_s: Time since the previous result outside the model: the engine's own; None after idleness.
        prompt_tokens, cached_tokens: Of the requests whose prompt was complete with this step.
        first_token_s: Arrival to first token, one entry per request that got its first one.
        inter_token_s: Time since the request's previous tokens, one entry per other request that got some.
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
    """The gauges when no step was planned, and what ended without one."""

    num_running: int
    num_waiting: int
    blocks: BlockStats | None
    ended: tuple[RequestStats, ...]


@attrs.frozen
class Rejected:
    """A request that was refused at admission, and why (a fixed word, never a client's text)."""

    reason: Literal["overloaded", "draining"]


Report = StepReport | IdleReport | Rejected
