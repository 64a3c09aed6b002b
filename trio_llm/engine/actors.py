"""Scheduler, KV manager and model runner: each one task that owns its state alone and holds no policy.

Per step one message goes each way on each edge: ask and grant, plan and result. The metrics actor is in metrics.py.
They live and die together, so none of them closes its channels: a channel closed by one that died would make the others
die of that, too, and hide the cause.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress

import attrs
import trio

from trio_llm.core.block_manager import BlockManager
from trio_llm.core.scheduler import Scheduler
from trio_llm.engine.health import Pulse
from trio_llm.engine.ledger import Entry, Ledger
from trio_llm.engine.messages import Abort, IdleReport, StepReport, Submit
from trio_llm.engine.nursery import open_nursery
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
    PromptLogprobs,
    Started,
    StepPlan,
    StepResult,
    StepTrace,
    Tokens,
)

Asks = trio.MemorySendChannel[BlockAsk]
Grants = trio.MemoryReceiveChannel[BlockGrant]
Plans = trio.MemorySendChannel[StepPlan]
Results = trio.MemoryReceiveChannel[StepResult]
Wait = Callable[[], Awaitable[StepResult]]

MAX_STEPS_IN_FLIGHT = 2


async def manage_blocks(
    blocks: BlockManager, asks: trio.MemoryReceiveChannel[BlockAsk], grants: trio.MemorySendChannel[BlockGrant]
) -> None:
    """Be the KV manager: answer each ask with a grant."""
    async for ask in asks:
        await grants.send(blocks.reserve(ask))


async def run_model(
    post: Callable[[StepPlan], Wait],
    plans: trio.MemoryReceiveChannel[StepPlan],
    results: trio.MemorySendChannel[StepResult],
) -> None:
    """Be the model runner: carry plans to the model's thread and results back, both in order.

    A plan is posted although results of those before it are still waited for: the thread goes from one to the next
    without the event loop.
    """
    send_posted, posted = trio.open_memory_channel[Wait](MAX_STEPS_IN_FLIGHT)

    async def bring_back() -> None:
        async for wait in posted:
            await results.send(await wait())

    async with open_nursery() as nursery:
        nursery.start_soon(bring_back)
        async for plan in plans:
            send_posted.send_nowait(post(plan))


@attrs.define(eq=False)
class SchedulerActor:
    """The scheduler: reads its inbox, asks for blocks, sends the plan, and only then tells clients of the last step.

    Attributes:
        depth: Steps in flight. With two, the runner has the next step before it is done with one, and its thread and
            the device need not wait for what goes on here.
    """

    core: Scheduler
    inbox: trio.MemoryReceiveChannel[Submit | Abort]
    tickets: Tickets
    pulse: Pulse
    trace: deque[StepTrace]
    report: Callable[[StepReport | IdleReport], None]
    asks: Asks
    grants: Grants
    plans: Plans
    results: Results
    depth: int = 1
    _in_flight: deque[StepPlan] = attrs.field(factory=deque[StepPlan])
    _ledger: Ledger = attrs.field(factory=Ledger)
    _blocks: BlockStats | None = None
    # When the last result came, on the clock that the runner measures its own seconds with; None after idleness.
    _result_at_s: float | None = None

    async def run(self) -> None:
        finished: _Step | None = None
        while True:
            self._read_inbox()
            while len(self._in_flight) < self.depth and (plan := await self._next_plan()) is not None:
                await self._start(plan)
            self._tell(finished)
            finished = await self._finish() if self._in_flight else await self._rest()

    def _read_inbox(self) -> None:
        with suppress(trio.WouldBlock):
            while True:
                self._take(self.inbox.receive_nowait())

    def _take(self, message: Submit | Abort) -> None:
        now_s = trio.current_time()
        match message:
            case Abort():
                self.core.abort(message.request_id)
                self._ledger.close(message.request_id, message.reason, now_s)
            case Submit():
                self._ledger.open(message)
                try:
                    self.core.submit(
                        message.request_id,
                        message.prompt_token_ids,
                        message.params,
                        priority=message.priority,
                        background=message.background,
                        salt=message.salt,
                        leader=message.leader,
                    )
                except TrioLLMError as error:
                    self._send(self._ledger.entries[message.request_id], Failed(error))
                    self._ledger.close(message.request_id, "error", now_s)
                    self.tickets.give_back(1)

    async def _next_plan(self) -> StepPlan | None:
        """Have the next step planned; None when there is nothing to run, or not before a step in flight is done."""
        while (ask := self.core.ask()) is not None:
            self.asks.send_nowait(ask)
            grant = await self.grants.receive()
            self._note(grant)
            if (plan := self.core.plan(grant)) is not None:
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
            self._ledger.preempted(request_id)
        for request_id in grant.request_ids[len(grant.request_ids) - grant.num_admitted :]:
            self._ledger.started(request_id, now_s)

    async def _start(self, plan: StepPlan) -> None:
        """Hand the plan to the runner and let it reach the model's thread."""
        self._in_flight.append(plan)
        self.plans.send_nowait(plan)
        # Trio runs the tasks that are ready in any order: after one round the runner may have run, after two it has.
        await trio.lowlevel.checkpoint()
        await trio.lowlevel.checkpoint()

    async def _finish(self) -> _Step:
        """Wait for the result of the first step in flight and commit it."""
        result = await self.results.receive()
        plan = self._in_flight.popleft()
        now_s = time.perf_counter()
        last_s, self._result_at_s = self._result_at_s, now_s
        own_s = None if last_s is None else max(0.0, now_s - last_s - result.seconds)
        commit = self.core.commit(result)
        self._beat(trio.current_time())
        self._note_failures(plan, result, commit)
        return _Step(plan, commit, trio.current_time(), own_s)

    def _note_failures(self, plan: StepPlan, result: StepResult, commit: Commit) -> None:
        """Count the steps in a row that failed as a whole; rows of requests that had ended before say nothing."""
        live = self._ledger.entries
        if any(request_id in live and request_id not in result.failed for request_id in plan.request_ids):
            self.pulse.failed_steps = 0
        elif any(isinstance(event, Failed) for _, event in commit.events):
            self.pulse.failed_steps += 1

    async def _rest(self) -> None:
        """Wait until there may be work again."""
        self.report(
            IdleReport(
                self.core.num_running, self.core.num_waiting, self._blocks, tuple(self._ledger.take_tally().ended)
            )
        )
        self._result_at_s = None
        self._beat(None)
        self._take(await self.inbox.receive())
        self._beat(trio.current_time())

    def _beat(self, now_s: float | None) -> None:
        self.pulse.progress_s = now_s
        self.pulse.num_running = self.core.num_running
        self.pulse.num_waiting = self.core.num_waiting

    def _tell(self, step: _Step | None) -> None:
        """Tell clients and metrics what a finished step meant, then free the tickets of what ended."""
        if step is not None:
            for request_id, event in step.commit.events:
                if (entry := self._ledger.entries.get(request_id)) is not None:
                    self._deliver(request_id, entry, event, step.at_s)
            self._report(step)
        self.tickets.give_back(len(self.core.take_ended()))

    def _deliver(self, request_id: int, entry: Entry, event: Event, at_s: float) -> None:
        self._send(entry, event)
        match event:
            case Tokens():
                self._ledger.produced(entry, len(event.token_ids), at_s)
            case Started():
                entry.num_cached_tokens = event.cached_tokens
            case Embedding():
                self._ledger.prompt_done(entry)
            case Finished():
                self._ledger.close(request_id, event.reason, at_s)
            case Failed():
                self._ledger.close(request_id, "error", at_s, corrupted=str(event.error) == CORRUPTED)
            case PromptLogprobs():
                pass

    def _send(self, entry: Entry, event: Event) -> None:
        # Where its reader has left, its Abort is in the inbox.
        with suppress(trio.BrokenResourceError):
            entry.reply.send_nowait(event)

    def _report(self, step: _Step) -> None:
        stats, plan = step.commit.stats, step.plan
        tally = self._ledger.take_tally()
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
    """A finished step whose meaning is yet to be told."""

    plan: StepPlan
    commit: Commit
    at_s: float
    own_s: float | None
