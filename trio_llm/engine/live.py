"""The engine at this moment, for people who watch it. While nobody does, nothing is collected and nothing is built.

The state is read between two steps of tasks, so it is whole. Building it is bounded in time: the larger it is, the less
often it is built. A watcher that is slow misses states; none is kept for it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Literal

import attrs
import trio

from trio_llm.core.block_manager import BlockManager
from trio_llm.core.block_view import PoolMap
from trio_llm.core.pace import StepPace
from trio_llm.core.scheduler import Scheduler
from trio_llm.core.sequence import Sequence as CoreSequence
from trio_llm.core.sequence import Status
from trio_llm.engine.history import History
from trio_llm.engine.messages import StepReport
from trio_llm.engine.metrics import Metrics
from trio_llm.errors import OverloadedError
from trio_llm.messages import StepTrace

MAX_WATCHERS = 8
MAX_CELLS = 4096
MAX_REQUESTS = 256
_MAX_TIMES = 4096
_INTERVAL_S = 0.2
# Largest share of the event loop's time that building may take.
_SHARE = 0.02


@attrs.frozen
class LiveRequest:
    """A request that runs or waits.

    Attributes:
        age_s: Time since its submission; None for the moment until it is known.
        num_computed: Tokens of prompt and output that are computed.
        num_blocks: Blocks that it owns, alone or with others.
    """

    request_id: int
    phase: Literal["waiting", "prefill", "decode"]
    age_s: float | None
    num_prompt_tokens: int
    num_cached_tokens: int
    num_computed: int
    num_generated_tokens: int
    num_preemptions: int
    num_blocks: int


@attrs.frozen
class LivePool:
    """The blocks, in cells of `blocks_per_cell` consecutive ones. Columns have one entry per cell.

    Attributes:
        states: A letter per cell: "u" used, "s" used and shared by several sequences, "c" free and cached, "f" free.
            With several blocks in a cell, the first of these that one of them is.
        owners: A sequence that owns a block of the cell, 0 for none.
        references: The largest reference count in the cell.
    """

    total_blocks: int
    blocks_per_cell: int
    states: str
    owners: tuple[int, ...]
    references: tuple[int, ...]


@attrs.frozen
class Times:
    """Quantiles of the times of `count` tokens, in seconds."""

    count: int
    p50_s: float
    p95_s: float


@attrs.frozen
class Snapshot:
    """The state at `at_s`, on Trio's clock; the next one is built at `next_at_s` at the earliest.

    Attributes:
        requests: The first MAX_REQUESTS, running ones first.
        prompt_budget: Prompt tokens that a step may compute now; None if only the token budget limits it.
        first_token, inter_token: Of the tokens since the last snapshot; None if there were none.
    """

    at_s: float
    next_at_s: float
    num_running: int
    num_waiting: int
    requests: tuple[LiveRequest, ...]
    pool: LivePool
    prompt_budget: int | None
    first_token: Times | None
    inter_token: Times | None


@attrs.define(eq=False)
class Live:
    """Builds snapshots while somebody watches.

    Attributes:
        trace: The last steps, oldest first; they are kept in any case.
        num_built: Number of snapshots built.
        num_watchers: Number of those who watch now.
    """

    _scheduler: Scheduler
    _blocks: BlockManager
    _history: History
    _metrics: Metrics
    _pace: StepPace | None
    token_budget: int
    trace: Sequence[StepTrace]
    num_built: int = attrs.field(default=0, init=False)
    num_watchers: int = attrs.field(default=0, init=False)
    _first_token_s: deque[float] = attrs.field(factory=lambda: deque[float](maxlen=_MAX_TIMES), init=False)
    _inter_token_s: deque[float] = attrs.field(factory=lambda: deque[float](maxlen=_MAX_TIMES), init=False)
    _latest: Snapshot | None = attrs.field(default=None, init=False)

    @contextmanager
    def watch(self) -> Generator[None]:
        """Collect times of tokens until the block ends.

        Raises:
            OverloadedError: MAX_WATCHERS watch already.
        """
        if self.num_watchers == MAX_WATCHERS:
            raise OverloadedError(f"{MAX_WATCHERS} clients watch the engine already. Close a page that does.")
        if not self.num_watchers:
            self._metrics.step_watchers.append(self._note)
        self.num_watchers += 1
        try:
            yield
        finally:
            self.num_watchers -= 1
            if not self.num_watchers:
                self._metrics.step_watchers.remove(self._note)
                self._latest = None
                self._first_token_s.clear()
                self._inter_token_s.clear()

    def snapshot(self) -> Snapshot:
        """Return the state, at most a fifth of a second old unless building takes long. All watchers share it."""
        now_s = trio.current_time()
        if self._latest is None or now_s >= self._latest.next_at_s:
            began_s = time.perf_counter()
            self._latest = self._build(now_s)
            took_s = time.perf_counter() - began_s
            self._latest = attrs.evolve(self._latest, next_at_s=now_s + max(_INTERVAL_S, took_s / _SHARE))
        return self._latest

    def steps_after(self, step: int) -> list[StepTrace]:
        """Return the remembered steps with a larger number, oldest first."""
        found: list[StepTrace] = []
        for trace in reversed(self.trace):
            if trace.stats.step <= step:
                break
            found.append(trace)
        return found[::-1]

    def _note(self, report: StepReport) -> None:
        self._first_token_s.extend(report.first_token_s)
        self._inter_token_s.extend(report.inter_token_s)

    def _build(self, now_s: float) -> Snapshot:
        self.num_built += 1
        core, pool = self._scheduler, self._blocks.pool_map()
        running, waiting = core.running, core.waiting
        requests = [
            _request(one, now_s, self._history.arrived_s(one.request_id), pool.held.get(one.request_id, 0))
            for one in islice((*running, *waiting), MAX_REQUESTS)
        ]
        return Snapshot(
            at_s=now_s,
            next_at_s=now_s,
            num_running=core.num_running,
            num_waiting=core.num_waiting,
            requests=tuple(requests),
            pool=_cells(pool),
            prompt_budget=None if self._pace is None else self._pace.prompt_tokens,
            first_token=_take(self._first_token_s),
            inter_token=_take(self._inter_token_s),
        )


def _request(one: CoreSequence, now_s: float, arrived_s: float | None, num_blocks: int) -> LiveRequest:
    # After a commit, a decode has one token that is not computed yet.
    running = "prefill" if len(one.tokens) - one.computed > 1 else "decode"
    return LiveRequest(
        request_id=one.request_id,
        phase=running if one.status is Status.RUNNING else "waiting",
        age_s=None if arrived_s is None else now_s - arrived_s,
        num_prompt_tokens=len(one.prompt),
        num_cached_tokens=one.cached_tokens or 0,
        num_computed=one.computed,
        num_generated_tokens=len(one.tokens) - len(one.prompt),
        num_preemptions=one.num_preemptions,
        num_blocks=num_blocks,
    )


def _cells(pool: PoolMap) -> LivePool:
    """Gather the blocks, without the null block, in at most MAX_CELLS cells."""
    total = len(pool.references) - 1
    size = -(-total // MAX_CELLS)
    references, owners, cached = pool.references[1:], pool.owners[1:], pool.cached[1:]
    if size > 1:
        cells = range(0, total, size)
        references = tuple([max(references[at : at + size]) for at in cells])
        owners = tuple([max(owners[at : at + size]) for at in cells])
        cached = tuple([any(cached[at : at + size]) for at in cells])
    states = "".join(
        [
            "s" if count > 1 else "u" if count else "c" if hit else "f"
            for count, hit in zip(references, cached, strict=True)
        ]
    )
    return LivePool(total, size, states, owners, references)


def _take(times_s: deque[float]) -> Times | None:
    """Return the quantiles of the times, and forget them."""
    if not times_s:
        return None
    ordered = sorted(times_s)
    times_s.clear()
    last = len(ordered) - 1
    return Times(len(ordered), ordered[last // 2], ordered[round(0.95 * last)])
