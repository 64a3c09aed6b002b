"""Why a request took as long as it did, from steps that the engine remembers or that a record has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import attrs

from trio_llm.core.block_math import blocks_for, first_visible_block
from trio_llm.core.prefix import Difference
from trio_llm.messages import BlockGrant
from trio_llm.model_info import KVGroup

MAX_ENTRIES = 256
"""Chunks, and waits, in one explanation; the first ones are kept."""

Reason = Literal["blocks", "order", "budget", "batch", "leader"]


class Ended(Protocol):
    """The statistics of an ended request; see `trio_llm.engine.messages.RequestStats`."""

    @property
    def reason(self) -> str: ...
    @property
    def queue_s(self) -> float | None: ...
    @property
    def prefill_s(self) -> float | None: ...
    @property
    def decode_s(self) -> float | None: ...
    @property
    def e2e_s(self) -> float: ...
    @property
    def num_accepted_drafts(self) -> int: ...


@attrs.define
class PastStep:
    """A step that was planned. `waiting`, `running` and `token_budget` are those of the ask."""

    step: int
    planned_s: float
    waiting: tuple[int, ...]
    running: tuple[int, ...]
    token_budget: int
    grant: BlockGrant
    committed_s: float | None = None


@attrs.define
class PastRequest:
    """What is known of a request besides its steps."""

    num_prompt_tokens: int
    leader: int | None
    arrived_s: float
    admitted: bool = False
    num_cached_tokens: int = 0
    difference: Difference | None = None
    stats: Ended | None = None


@attrs.frozen
class PromptChunk:
    """A part of the prompt that one step computed.

    Attributes:
        first, count: Position of its first token, and number of tokens.
        seconds: From plan to result; None if the step runs.
        holders: The other requests of the step -> blocks that each held.
        others: The same -> tokens of each.
        again: It begins before what was computed already, because of a preemption.
    """

    step: int
    first: int
    count: int
    seconds: float | None
    holders: dict[int, int]
    others: dict[int, int]
    again: bool


@attrs.define
class Wait:
    """Consecutive steps in which the request waited for the same reason.

    Attributes:
        reason: "blocks": not enough were free. "order": a request before it did not get its blocks. "budget": other
            requests used the tokens of the step. "batch": the maximum number of requests ran. "leader": another sample
            of its prompt was to compute it first.
        seconds: From the first of these steps to the one after them.
        holders: The requests that ran -> blocks that each held, in the last of these steps.
        free_blocks: Blocks that were free then.
        others: The requests that ran -> tokens that each computed then.
    """

    reason: Reason
    first_step: int
    last_step: int
    began_s: float
    seconds: float
    holders: dict[int, int]
    free_blocks: int
    others: dict[int, int]


@attrs.define
class Explanation:
    """Where the time of one request went. Durations are in seconds, None if it did not get that far.

    Attributes:
        complete: Every step since its arrival is remembered.
        needed_blocks: Blocks for its prompt.
        difference: Where its prompt leaves a cached one; None if nothing after the cached part begins alike.
        num_decode_steps: Steps that computed its generated tokens.
        drafts: Its verified drafts.
        accepted: How many of them were accepted; None until it ended.
    """

    state: Literal["waiting", "running", "ended"]
    reason: str | None
    complete: bool
    num_prompt_tokens: int
    num_cached_tokens: int
    needed_blocks: int
    difference: Difference | None
    total_s: float
    queue_s: float | None = None
    prefill_s: float | None = None
    decode_s: float | None = None
    waits: list[Wait] = attrs.field(factory=list[Wait])
    chunks: list[PromptChunk] = attrs.field(factory=list[PromptChunk])
    preempted_steps: list[int] = attrs.field(factory=list[int])
    num_decode_steps: int = 0
    drafts: int = 0
    accepted: int | None = None


def explain(
    request_id: int,
    request: PastRequest,
    steps: Sequence[PastStep],
    *,
    groups: Sequence[KVGroup],
    max_batch_size: int,
    now_s: float,
) -> Explanation:
    """Walk through the remembered steps of a request."""
    stats = request.stats
    end_s = now_s if stats is None else request.arrived_s + stats.e2e_s
    explanation = Explanation(
        state="ended" if stats is not None else "waiting",
        reason=None if stats is None else stats.reason,
        complete=not steps or steps[0].step == 1 or steps[0].planned_s <= request.arrived_s,
        num_prompt_tokens=request.num_prompt_tokens,
        num_cached_tokens=request.num_cached_tokens,
        needed_blocks=sum(blocks_for(request.num_prompt_tokens, group) for group in groups),
        difference=request.difference,
        total_s=end_s - request.arrived_s,
    )
    walk = _Walk(request_id, request, explanation, groups, max_batch_size)
    for step in steps:
        if step.planned_s > end_s:
            break
        walk.see(step)
    walk.end_wait(end_s)
    if stats is not None:
        explanation.queue_s, explanation.prefill_s = stats.queue_s, stats.prefill_s
        explanation.decode_s, explanation.accepted = stats.decode_s, stats.num_accepted_drafts
    return explanation


class _Walk:
    """Follows one request through steps."""

    def __init__(
        self,
        request_id: int,
        request: PastRequest,
        explanation: Explanation,
        groups: Sequence[KVGroup],
        max_batch_size: int,
    ) -> None:
        self._id, self._request, self._into = request_id, request, explanation
        self._groups, self._max_batch_size = groups, max_batch_size
        self._places: dict[int, tuple[int, int]] = {}  # request -> start and end of its last row
        self._furthest = 0
        self._wait: Wait | None = None

    def see(self, step: PastStep) -> None:
        grant = step.grant
        for request_id, start, count in zip(grant.request_ids, grant.starts, grant.counts, strict=True):
            self._places[request_id] = start, start + count
        if step.planned_s < self._request.arrived_s:
            return
        if self._id in grant.preempted:
            self._into.preempted_steps.append(step.step)
        if self._id in grant.request_ids:
            self.end_wait(step.planned_s)
            self._row(step, grant.request_ids.index(self._id))
        elif (reason := self._why(step)) is not None:
            self._extend_wait(step, reason)

    def _row(self, step: PastStep, at: int) -> None:
        into, grant = self._into, step.grant
        start, count = grant.starts[at], grant.counts[at]
        drafts = grant.drafts[at] if grant.drafts else 0
        if into.state == "waiting":
            into.state = "running"
        if into.queue_s is None:
            into.queue_s = step.planned_s - self._request.arrived_s
        into.drafts += drafts
        if count - drafts == 1 and start >= self._request.num_prompt_tokens:
            into.num_decode_steps += 1
        elif len(into.chunks) < MAX_ENTRIES:
            seconds = None if step.committed_s is None else step.committed_s - step.planned_s
            others = _tokens(grant, self._id)
            holders = {other: self._blocks_of(other) for other in others}
            into.chunks.append(PromptChunk(step.step, start, count, seconds, holders, others, start < self._furthest))
        self._furthest = max(self._furthest, start + count - drafts)

    def _why(self, step: PastStep) -> Reason | None:
        """Return what the request waited for in a step without a row of it; None if it did not wait."""
        grant = step.grant
        spent = sum(grant.counts) >= step.token_budget
        if self._id in step.running and self._id not in grant.preempted:
            # It runs; without a row, the others took the budget, or its last token is in flight.
            return "budget" if spent and self._furthest < self._request.num_prompt_tokens else None
        if self._id in step.waiting:
            if spent and not grant.preempted:
                return "budget"
            first_refused = step.waiting.index(self._id) == grant.num_admitted
            return "blocks" if first_refused or grant.preempted else "order"
        if self._id in grant.preempted:
            return "blocks"
        if self._request.leader is not None and not self._request.admitted:
            return "leader"
        return "batch" if len(step.running) >= self._max_batch_size else "budget" if spent else "order"

    def _extend_wait(self, step: PastStep, reason: Reason) -> None:
        grant, stats = step.grant, step.grant.stats
        running = dict.fromkeys((*step.running, *grant.request_ids))
        lost = {self._id, *grant.preempted}
        holders = {request_id: self._blocks_of(request_id) for request_id in running if request_id not in lost}
        free = stats.total_blocks - sum(stats.used_blocks)
        if self._wait is None or self._wait.reason != reason:
            self.end_wait(step.planned_s)
            self._wait = Wait(reason, step.step, step.step, step.planned_s, 0.0, holders, free, {})
        self._wait.last_step, self._wait.holders, self._wait.free_blocks = step.step, holders, free
        self._wait.others = _tokens(grant, self._id)

    def _blocks_of(self, request_id: int) -> int:
        start, end = self._places.get(request_id, (0, 0))
        return sum(blocks_for(end, group) - first_visible_block(group, start) for group in self._groups)

    def end_wait(self, at_s: float) -> None:
        """Add the wait that is going on, if there is one."""
        wait, self._wait = self._wait, None
        if wait is not None and len(self._into.waits) < MAX_ENTRIES:
            wait.seconds = at_s - wait.began_s
            self._into.waits.append(wait)


def _tokens(grant: BlockGrant, request_id: int) -> dict[int, int]:
    """Return the tokens of the other rows."""
    return {other: count for other, count in zip(grant.request_ids, grant.counts, strict=True) if other != request_id}
