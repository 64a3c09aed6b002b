"""The scheduler actor and the KV manager: each is one task that alone owns its state and contains no policy.

Per step, one message goes each way on each edge: ask and grant, plan and result. The model runner is in
step_pipeline.py, the metrics actor in metrics.py. The actors live and die together, so none of them closes its
channels: if one failed and closed a channel, the others would fail because of that and hide the cause.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

import attrs
import trio

from trio_llm.core.block_manager import BlockManager
from trio_llm.core.pace import StepPace
from trio_llm.core.scheduler import Scheduler
from trio_llm.engine.core_watcher import CoreWatcher
from trio_llm.engine.health import Pulse
from trio_llm.engine.messages import Abort, IdleReport, StepReport, Submit
from trio_llm.engine.request_records import Entry, RequestRecords, Tally
from trio_llm.engine.step_pipeline import StepPipeline
from trio_llm.engine.tickets import Tickets
from trio_llm.errors import TrioLLMError
from trio_llm.messages import (
    CORRUPTED,
    BlockAsk,
    BlockGrant,
    BlockStats,
    Commit,
    Embedding,
    Event,
    Failed,
    Finished,
    Progress,
    PromptLogprobs,
    Started,
    StepPlan,
    StepResult,
    StepTrace,
    Tokens,
)

Asks = trio.MemorySendChannel[BlockAsk]
Grants = trio.MemoryReceiveChannel[BlockGrant]


async def manage_blocks(
    blocks: BlockManager, asks: trio.MemoryReceiveChannel[BlockAsk], grants: trio.MemorySendChannel[BlockGrant]
) -> None:
    """Run the KV manager: answer each ask with a grant."""
    async for ask in asks:
        grants.send_nowait(blocks.reserve(ask))


@attrs.define(eq=False)
class SchedulerActor:
    """The scheduler actor: reads its inbox, asks for blocks, launches the plan, then sends the last step's events.

    Attributes:
        depth: Maximum steps in flight. With two, the runner has the next step before it finishes the current one, so
            its thread and the device do not wait for this actor.
        pace: Limits the prompt tokens of a step; None if max_num_batched_tokens is the only limit.
        watchers: See each call of the core.
    """

    core: Scheduler
    inbox: trio.MemoryReceiveChannel[Submit | Abort]
    tickets: Tickets
    pulse: Pulse
    trace: deque[StepTrace]
    report: Callable[[StepReport | IdleReport], None]
    asks: Asks
    grants: Grants
    pipeline: StepPipeline
    depth: int = 1
    pace: StepPace | None = None
    watchers: Sequence[CoreWatcher] = ()
    _in_flight: deque[StepPlan] = attrs.field(factory=deque[StepPlan])
    _finished: _Step | None = None  # whose events are not sent yet
    _records: RequestRecords = attrs.field(factory=RequestRecords)
    _blocks: BlockStats | None = None
    # Time of the last result, on the clock of StepResult.seconds; None after idleness.
    _result_at_s: float | None = None

    async def run(self) -> None:
        while True:
            self._read_inbox()
            while len(self._in_flight) < self.depth and (plan := await self._next_plan()) is not None:
                self._in_flight.append(plan)
                self.pipeline.launch(plan)
            self._publish()
            self._finished = await self._finish() if self._in_flight else await self._rest()

    def _read_inbox(self) -> None:
        with suppress(trio.WouldBlock):
            while True:
                self._take(self.inbox.receive_nowait())

    def _take(self, message: Submit | Abort) -> None:
        now_s = trio.current_time()
        match message:
            case Abort():
                self._publish()  # The request may have ended by itself, or have a token that its reader has not got.
                self.core.abort(message.request_id)
                for watcher in self.watchers:
                    watcher.left(message.request_id, message.reason, now_s)
                if message.tells and (entry := self._records.entries.get(message.request_id)) is not None:
                    entry.mailbox.put(Finished(message.reason, entry.usage))
                self._records.close(message.request_id, message.reason, now_s)
            case Submit():
                self._records.open(message)
                try:
                    self.core.submit(message.request_id, message.submission)
                except TrioLLMError as error:
                    message.mailbox.put(Failed(error))
                    self._records.close(message.request_id, "error", now_s)
                    self.tickets.give_back(1)
                    return
                if self.pulse.progress_s is None:
                    self._beat(now_s)
                for watcher in self.watchers:
                    watcher.arrived(message.request_id, message.submission, message.times.arrived_s)

    async def _next_plan(self) -> StepPlan | None:
        """Plan the next step; None if nothing can run, or nothing before a step in flight ends."""
        while (ask := self.core.ask(prompt_tokens := self._prompt_tokens())) is not None:
            self.asks.send_nowait(ask)
            grant = await self.grants.receive()
            self._note(grant)
            plan = self.core.plan(grant)
            at_s = trio.current_time()
            for watcher in self.watchers:
                watcher.planned(at_s, prompt_tokens, ask, grant, plan)
            if plan is not None:
                return plan
            if not ask.released and not grant.preempted:
                if self._in_flight:
                    return None
                raise RuntimeError("there is work, but neither a row nor a block moved: the scheduler is stuck")
        return None

    def _note(self, grant: BlockGrant) -> None:
        self._blocks = grant.stats
        now_s = trio.current_time()
        for request_id in grant.preempted:
            self._records.preempted(request_id)
        for request_id in grant.request_ids[len(grant.request_ids) - grant.num_admitted :]:
            self._records.started(request_id, now_s)

    def _prompt_tokens(self) -> int | None:
        """Return the maximum prompt tokens of the next step; None for a sequence that is alone: it delays no other."""
        alone = self.core.num_running + self.core.num_waiting <= 1
        return None if self.pace is None or alone else self.pace.prompt_tokens

    async def _finish(self) -> _Step:
        """Wait for the result of the oldest step in flight and commit it."""
        result = await self.pipeline.next_result()
        plan = self._in_flight.popleft()
        if self.pace is not None:
            self.pace.observe(plan, result.seconds)
        now_s = time.perf_counter()
        last_s, self._result_at_s = self._result_at_s, now_s
        own_s = None if last_s is None else max(0.0, now_s - last_s - result.seconds)
        commit = self.core.commit(result)
        self._records.verified(plan)
        at_s = trio.current_time()
        for watcher in self.watchers:
            watcher.committed(at_s, result, commit)
        self._beat(at_s)
        self.pulse.has_stepped = True
        self._note_failures(plan, result, commit)
        return _Step(plan, commit, at_s, own_s)

    def _note_failures(self, plan: StepPlan, result: StepResult, commit: Commit) -> None:
        """Count consecutive steps in which every request failed; rows of requests that had ended do not count."""
        live = self._records.entries
        if any(request_id in live and request_id not in result.failed for request_id in plan.request_ids):
            self.pulse.failed_steps = 0
        elif any(isinstance(event, Failed) for _, event in commit.first):
            self.pulse.failed_steps += 1

    async def _rest(self) -> None:
        """Wait for a message."""
        ended = tuple(self._take_tally().ended)
        self.report(IdleReport(self.core.num_running, self.core.num_waiting, self._blocks, ended))
        self._result_at_s = None
        self._beat(None)
        self._take(await self.inbox.receive())

    def _beat(self, now_s: float | None) -> None:
        self.pulse.progress_s = now_s
        self.pulse.num_running = self.core.num_running
        self.pulse.num_waiting = self.core.num_waiting

    def _publish(self) -> None:
        """Send the events of a finished step to clients and metrics, then return the tickets of ended requests."""
        step, self._finished = self._finished, None
        if step is not None:
            for request_id, event in step.commit.events:
                if (entry := self._records.entries.get(request_id)) is not None:
                    self._deliver(request_id, entry, event, step.at_s)
            self._report(step)
        self.tickets.give_back(len(self.core.take_ended()))

    def _deliver(self, request_id: int, entry: Entry, event: Event, at_s: float) -> None:
        entry.mailbox.put(event)
        match event:
            case Tokens():
                self._records.produced(entry, len(event.token_ids), at_s)
            case Started():
                entry.num_cached_tokens = event.cached_tokens
            case Embedding():
                self._records.prompt_done(entry)
            case Finished():
                self._records.close(request_id, event.reason, at_s)
            case Failed():
                self._records.close(request_id, "error", at_s, corrupted=str(event.error) == CORRUPTED)
            case PromptLogprobs() | Progress():
                pass

    def _take_tally(self) -> Tally:
        tally = self._records.take_tally()
        for stats in tally.ended:
            for watcher in self.watchers:
                watcher.ended(stats)
        return tally

    def _report(self, step: _Step) -> None:
        stats, plan = step.commit.stats, step.plan
        tally = self._take_tally()
        self.report(
            StepReport(
                stats=stats,
                request_ids=plan.request_ids,
                at_s=step.at_s,
                own_s=step.own_s,
                prompt_tokens=tally.prompt_tokens,
                cached_tokens=tally.cached_tokens,
                first_token_s=tuple(tally.first_token_s),
                inter_token_s=tuple(tally.inter_token_s),
                ended=tuple(tally.ended),
            )
        )
        self.trace.append(StepTrace(plan.request_ids, plan.starts, plan.counts, stats, step.own_s))


@attrs.frozen
class _Step:
    """A finished step whose events are not sent yet."""

    plan: StepPlan
    commit: Commit
    at_s: float
    own_s: float | None
