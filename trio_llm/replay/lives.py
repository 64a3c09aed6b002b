"""The life of each request in a record: when it waited, computed, was preempted and ended, step by step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import attrs

from trio_llm.messages import BlockAsk, BlockGrant, Commit, Failed, Finished, Started, Tokens
from trio_llm.replay.frames import Arrival, Call, Committed, Leave
from trio_llm.replay.machine import PlannedStep
from trio_llm.replay.request import Request

if TYPE_CHECKING:
    from trio_llm.replay.replay import Replay


@attrs.frozen
class Chunk:
    """A row of a step.

    Attributes:
        start, count: Position of its first token, and number of tokens.
        drafts: Number of its last tokens that are drafts.
        others: Number of other rows in the step; other_tokens: of tokens in them.
        decodes: It computes one generated token, and drafts.
    """

    step: int
    start: int
    count: int
    drafts: int
    others: int
    other_tokens: int
    decodes: bool


@attrs.define
class Life:
    """One request. Times are in seconds from the start of the record; None where it did not get that far, or before.

    Attributes:
        arrived_step: The step that was committed last when it arrived.
        waited_steps: Planned steps in which it waited; it may have waited in others behind those that were looked at.
        chunks: Its rows, the decodes too.
        preempted: The steps that took its blocks.
        reason: Why it ended: a finish reason, "error", or None if it did not.
        num_accepted: Drafts that were accepted.
        last_token_s: Time of the last token.
    """

    request: Request
    arrived_s: float | None
    arrived_step: int
    started_step: int | None = None
    started_s: float | None = None
    first_token_step: int | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    ended_step: int | None = None
    ended_s: float | None = None
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    num_drafts: int = 0
    num_accepted: int = 0
    reason: str | None = None
    waited_steps: list[int] = attrs.field(factory=list[int])
    chunks: list[Chunk] = attrs.field(factory=list[Chunk])
    preempted: list[int] = attrs.field(factory=list[int])

    @property
    def request_id(self) -> int:
        return self.request.request_id

    @property
    def stats(self) -> LifeStats | None:
        """Its statistics, as the engine keeps them; None if it has not ended."""
        if self.reason is None or self.ended_s is None:
            return None
        return LifeStats(
            self.reason,
            _between(self.arrived_s, self.started_s),
            _between(self.started_s, self.first_token_s),
            _between(self.first_token_s, self.last_token_s),
            self.ended_s - (self.arrived_s or 0.0),
            self.num_accepted,
        )


@attrs.frozen
class LifeStats:
    """The end of a request. Durations are in seconds, None if it did not get that far."""

    reason: str
    queue_s: float | None
    prefill_s: float | None
    decode_s: float | None
    e2e_s: float
    num_accepted_drafts: int


def _between(start_s: float | None, end_s: float | None) -> float | None:
    return None if start_s is None or end_s is None else end_s - start_s


class Lives:
    """Follows requests through a run, live ones of a replay or of a what-if."""

    def __init__(self) -> None:
        self.lives: dict[int, Life] = {}
        self.step = 0

    def arrived(self, request: Request, at_s: float | None) -> None:
        self.lives[request.request_id] = Life(request, at_s, self.step)

    def left(self, request_id: int, reason: str, at_s: float) -> None:
        life = self.lives.get(request_id)
        if life is not None and life.reason is None:
            life.reason, life.ended_s, life.ended_step = reason, at_s, self.step

    def planned(self, ask: BlockAsk, grant: BlockGrant, at_s: float) -> None:
        for request_id in grant.preempted:
            self.lives[request_id].preempted.append(ask.step)
        first = len(grant.request_ids) - grant.num_admitted
        for request_id in ask.waiting[grant.num_admitted :]:
            self.lives[request_id].waited_steps.append(ask.step)
        num_tokens, drafts = sum(grant.counts), grant.drafts or (0,) * len(grant.counts)
        columns = zip(grant.request_ids, grant.starts, grant.counts, drafts, strict=True)
        for at, (request_id, start, count, num_drafts) in enumerate(columns):
            life = self.lives[request_id]
            if at >= first and life.started_step is None:
                life.started_step, life.started_s = ask.step, at_s
            decodes = count - num_drafts == 1 and start >= life.request.num_prompt_tokens
            others = len(grant.counts) - 1
            life.num_drafts += num_drafts
            life.chunks.append(Chunk(ask.step, start, count, num_drafts, others, num_tokens - count, decodes))

    def committed(self, step: int, at_s: float, commit: Commit) -> None:
        self.step = step
        for request_id, event in commit.events:
            life = self.lives[request_id]
            match event:
                case Started():
                    life.num_cached_tokens = event.cached_tokens
                case Tokens():
                    if life.first_token_s is None:
                        life.first_token_step, life.first_token_s = step, at_s
                    life.last_token_s = at_s
                    life.num_output_tokens += len(event.token_ids)
                    life.num_accepted += len(event.token_ids) - 1
                case Finished():
                    life.reason, life.ended_step, life.ended_s = event.reason, step, at_s
                case Failed():
                    life.reason, life.ended_step, life.ended_s = "error", step, at_s
                case _:
                    pass


@attrs.frozen
class StepRow:
    """One step of a record, in numbers. `seconds` is the time in the model."""

    step: int
    at_s: float
    seconds: float
    num_rows: int
    num_tokens: int
    num_prefill_tokens: int
    num_running: int
    num_waiting: int
    num_preempted: int
    used_blocks: int
    cached_blocks: int
    total_blocks: int


def follow(replay: Replay) -> tuple[Sequence[Life], Sequence[StepRow]]:
    """Walk through a record; return all requests by arrival, and all steps."""
    lives, steps = Lives(), list[StepRow]()
    for call, made in walk(replay, lives):
        if isinstance(call, Committed):
            assert isinstance(made, Commit)
            steps.append(_row(call, made))
    return tuple(lives.lives.values()), steps


def walk(replay: Replay, lives: Lives) -> Iterator[tuple[Call, Commit | PlannedStep | None]]:
    """Yield every call of a record and what came of it, after `lives` has seen it."""
    lives.step = replay.first_step - 1
    for request in replay.known_at_start:
        lives.arrived(request, None)
    for call, made in replay.calls():
        match call:
            case Arrival():
                lives.arrived(call.request, call.at_s)
            case Leave():
                lives.left(call.request_id, call.reason, call.at_s)
            case Committed():
                assert isinstance(made, Commit)
                lives.committed(call.step, call.at_s, made)
            case _:
                assert isinstance(made, PlannedStep)
                lives.planned(made.ask, made.grant, call.at_s)
        yield call, made


def _row(call: Committed, commit: Commit) -> StepRow:
    stats, blocks = commit.stats, commit.stats.blocks
    return StepRow(
        call.step,
        call.at_s,
        call.seconds,
        stats.num_rows,
        stats.num_tokens,
        stats.num_prefill_tokens,
        stats.num_running,
        stats.num_waiting,
        stats.num_preempted,
        sum(blocks.used_blocks),
        blocks.cached_blocks,
        blocks.total_blocks,
    )
