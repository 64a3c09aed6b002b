"""What the engine remembers of its last steps and requests, to explain why a request was slow.

A step adds one entry, which refers to the grant that exists anyway; only a question walks through the entries. Memory
is bounded, in rows of steps and in requests.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from functools import partial
from itertools import chain

import attrs
import trio

from trio_llm.core.block_manager import BlockManager
from trio_llm.engine.messages import RequestStats
from trio_llm.messages import BlockAsk, BlockGrant, Commit, FinishReason, StepPlan, StepResult
from trio_llm.params import Submission
from trio_llm.replay.explanation import Explanation, PastRequest, PastStep, explain

MAX_ROWS = 65_536
"""Rows of all steps that are remembered, see `_rows_kept`: 150 bytes each, 300 where steps have one row."""

# Ids are shared, so one costs 8 bytes in each column that has it: so many are counted as one row.
_IDS_PER_ROW = 16

MAX_ENDED = 1024
"""Ended requests that are remembered."""


class History:
    """A `CoreWatcher` that remembers the last steps, the live requests and the last ones that ended."""

    def __init__(self, blocks: BlockManager, max_batch_size: int) -> None:
        self._blocks = blocks
        self._max_batch_size = max_batch_size
        self._steps = deque[PastStep]()
        self._num_rows = 0
        self._in_flight: dict[int, PastStep] = {}
        self._live: dict[int, PastRequest] = {}
        self._ended: OrderedDict[int, PastRequest] = OrderedDict()

    async def explain(self, request_id: int) -> Explanation | None:
        """Explain where a request's time went; None if it is not remembered."""
        request = self._live.get(request_id) or self._ended.get(request_id)
        if request is None:
            return None
        # The walk takes milliseconds, so it runs in a thread, on copies.
        steps, copied = tuple(self._steps), attrs.evolve(request)
        work = partial(
            explain,
            request_id,
            copied,
            steps,
            groups=self._blocks.groups,
            max_batch_size=self._max_batch_size,
            now_s=trio.current_time(),
        )
        return await trio.to_thread.run_sync(work)

    def arrived_s(self, request_id: int) -> float | None:
        """Return when a live request was submitted, on Trio's clock; None for others."""
        request = self._live.get(request_id)
        return None if request is None else request.arrived_s

    # --- from the scheduler actor and from metrics ----------------------------------------------------------------

    def arrived(self, request_id: int, submission: Submission, at_s: float) -> None:
        self._live[request_id] = PastRequest(len(submission.prompt_token_ids), submission.leader, at_s)

    def left(self, request_id: int, reason: FinishReason, at_s: float) -> None:
        """Nothing to keep: `ended` follows."""

    def planned(
        self,
        at_s: float,
        prompt_tokens: int | None,  # noqa: ARG002 - the interface has it
        ask: BlockAsk,
        grant: BlockGrant,
        plan: StepPlan | None,
    ) -> None:
        step = PastStep(ask.step, at_s, ask.waiting, ask.preempt_order, ask.token_budget, grant)
        if plan is not None:
            self._in_flight[ask.step] = step
        self._steps.append(step)
        self._num_rows += _rows_kept(step)
        while self._num_rows > MAX_ROWS:
            self._num_rows -= _rows_kept(self._steps.popleft())
        if grant.num_admitted:
            self._note_admitted(grant)

    def _note_admitted(self, grant: BlockGrant) -> None:
        first = len(grant.request_ids) - grant.num_admitted
        for request_id, start in zip(grant.request_ids[first:], grant.starts[first:], strict=True):
            request = self._live.get(request_id)
            if request is not None and not request.admitted:
                request.admitted = True
                request.num_cached_tokens = start
                request.difference = self._blocks.difference(request_id, start)

    def committed(self, at_s: float, result: StepResult, commit: Commit) -> None:  # noqa: ARG002 - as above
        self._in_flight.pop(result.step).committed_s = at_s

    def ended(self, stats: RequestStats) -> None:
        """Keep the statistics of an ended request, and forget the oldest one."""
        if (request := self._live.pop(stats.request_id, None)) is not None:
            request.stats = stats
            self._ended[stats.request_id] = request
            if len(self._ended) > MAX_ENDED:
                self._ended.popitem(last=False)


def _rows_kept(step: PastStep) -> int:
    """Return the memory of a step in rows: its own, two for the step itself, and the ids of its other columns.

    A step of one row may have hundreds of sequences that run or wait, and thousands of cached blocks.
    """
    grant = step.grant
    num_ids = len(step.waiting) + len(step.running) + len(grant.preempted)
    num_ids += sum([len(blocks) for _, blocks in chain.from_iterable(grant.new_blocks)])
    return 2 + len(grant.request_ids) + num_ids // _IDS_PER_ROW
