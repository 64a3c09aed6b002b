"""The scheduler: chooses the tokens of each step and applies each step's result to the sequences.

A pure state machine: `ask -> (BlockManager.reserve) -> plan -> (runner) -> commit`. It has no blocks, no clock and no
random numbers: the same calls in the same order give the same plans. One step may be planned while the runner executes
the previous one; such a plan contains tokens that are not sampled yet. Commits come in the order of the plans.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Seq

from trio_llm.core.queues import Queues
from trio_llm.core.running_step import RunningStep, without_ended
from trio_llm.core.sequence import Sequence, Status, StopCondition
from trio_llm.core.speculation import Speculation
from trio_llm.core.step_order import check_ask, check_commit, check_plan
from trio_llm.errors import InvalidRequestError, RequestFailedError
from trio_llm.messages import (
    CONTRADICTED,
    Admission,
    Admit,
    BlockAsk,
    BlockGrant,
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
)
from trio_llm.params import SamplingParams, Submission, check_prompt_length

Events = list[tuple[int, Event]]

# Above every priority, which are 64-bit integers.
_BACKGROUND = 2**65


class Scheduler:
    """Continuous batching with one token budget per step.

    Decodes are scheduled first, then prefill chunks, in the same batch. Running sequences come before waiting ones. The
    first waiting sequence that does not get its blocks stops admission, so none starves. When blocks run out, the last
    sequence in policy order is preempted and recomputed later.

    Args:
        max_num_batched_tokens: Maximum tokens in one step.
        max_batch_size: Maximum running sequences.
        max_model_len: Maximum prompt plus output of one sequence; at most BlockManager.max_tokens().
        eos_token_ids: End-of-sequence ids, the primary one first.
        policy: "fcfs", or "priority": smaller numbers first, then by arrival.
        long_prefill_token_threshold: Maximum tokens of one sequence in a step; 0 means the budget is the limit.
        speculation: Speculative decoding; None disables it.
    """

    def __init__(
        self,
        *,
        max_num_batched_tokens: int,
        max_batch_size: int,
        max_model_len: int,
        eos_token_ids: Seq[int],
        policy: str = "fcfs",
        long_prefill_token_threshold: int = 0,
        speculation: Speculation | None = None,
    ) -> None:
        assert policy in ("fcfs", "priority")
        self._token_budget = max_num_batched_tokens
        self._max_batch_size = max_batch_size
        self._max_model_len = max_model_len
        self._eos_token_ids = tuple(eos_token_ids)
        self._by_priority = policy == "priority"
        self._max_row_tokens = min(long_prefill_token_threshold or max_num_batched_tokens, max_num_batched_tokens)
        self._speculation = speculation
        self._queues = Queues()
        self._num_arrivals = 0
        self._step = 0
        self._asked: BlockAsk | None = None
        self._in_flight = deque[RunningStep]()
        self._to_release: list[Sequence] = []
        self._to_drop: list[int] = []
        self._ended: list[int] = []
        self._num_preempted = 0  # Since the last step was counted.

    def __repr__(self) -> str:
        queues = self._queues
        held = f", {queues.num_held} held" if queues.num_held else ""
        return f"<Scheduler at step {self._step}: {len(queues.running)} running, {len(queues.waiting)} waiting{held}>"

    @property
    def num_running(self) -> int:
        return len(self._queues.running)

    @property
    def num_waiting(self) -> int:
        return len(self._queues.waiting) + self._queues.num_held

    @property
    def num_held(self) -> int:
        """Waiting sequences whose leader's prompt is not computed yet."""
        return self._queues.num_held

    @property
    def running(self) -> tuple[Sequence, ...]:
        """The running sequences in policy order; the last one is preempted first."""
        return tuple(self._queues.running)

    @property
    def waiting(self) -> tuple[Sequence, ...]:
        """The waiting sequences in the order of admission, without those held for their leader."""
        return tuple(self._queues.waiting)

    # --- from clients ---------------------------------------------------------------------------------------------

    def submit(self, request_id: int, submission: Submission) -> None:
        """Queue a sequence. Its parameters are final: None means no limit.

        A sequence with a leader waits until the leader's prompt is computed, or the leader ended. It then finds the
        prompt in the prefix cache.

        Args:
            request_id: Must not be in use.
        Raises:
            InvalidRequestError: The prompt is empty or leaves no room for the output, or the id is in use. The state is
                unchanged.
        """
        if request_id in self._queues:
            raise InvalidRequestError(f"request_id = {request_id} is in use by another request.", param="request_id")
        prompt, params = submission.prompt_token_ids, submission.params
        check_prompt_length(len(prompt), self._max_model_len, generates=isinstance(params, SamplingParams))
        self._num_arrivals += 1
        stop = StopCondition.of(params, len(prompt), self._max_model_len, self._eos_token_ids)
        sequence = Sequence(request_id, submission, (self.level_of(submission), self._num_arrivals), stop, list(prompt))
        self._queues.add(sequence, submission.leader)

    def level_of(self, submission: Submission) -> int:
        """Return the first part of its place in policy order; smaller is scheduled first."""
        return (submission.priority if self._by_priority else 0) + (_BACKGROUND if submission.background else 0)

    def abort(self, request_id: int) -> None:
        """End a sequence in any state. No event follows. Results of steps in flight are dropped for it."""
        sequence = self._queues.get(request_id)
        if sequence is not None:
            self._end(sequence)

    def take_ended(self) -> tuple[int, ...]:
        """Return the sequences whose blocks were released since the last call, or that never had any."""
        ended, self._ended = tuple(self._ended), []
        return ended

    # --- ask ------------------------------------------------------------------------------------------------------

    def ask(self, prompt_tokens: int | None = None) -> BlockAsk | None:
        """Return what the next step needs from the KV manager; None if there is nothing to run and nothing to release.

        At most one step may be in flight: an UNKNOWN token refers to the previous step.

        Args:
            prompt_tokens: Maximum tokens of the step in addition to its decodes, at least 1; None means that
                max_num_batched_tokens is the only limit.

        Raises:
            OutOfOrderError: The last ask is not planned, or two steps are in flight.
        """
        check_ask(self._asked, len(self._in_flight))
        running = self._queues.running
        decodes = [sequence for sequence in running if sequence.target - sequence.scheduled == 1]
        all_decode = len(decodes) == len(running)
        prefills = [] if all_decode else [sequence for sequence in running if sequence.target - sequence.scheduled > 1]
        rows = decodes + prefills
        token_budget = self._budget(len(decodes), prompt_tokens)
        max_row_tokens = min(self._max_row_tokens, token_budget)
        slots = min(self._max_batch_size - len(running), token_budget - len(decodes))  # A row costs at least one token.
        candidates = self._queues.waiting[: max(0, slots)]
        if not (rows or candidates or self._to_release):
            return None
        if len(rows) < len(running):  # The others end with the step in flight, but keep their blocks.
            rows += [sequence for sequence in running if sequence.target == sequence.scheduled]
        ends = [min(sequence.target, sequence.scheduled + max_row_tokens) for sequence in rows]
        released, self._to_release = self._to_release, []
        self._step += 1
        request_ids = tuple([sequence.request_id for sequence in rows])
        columns = self._speculation and self._speculation.draft_columns(decodes, rows + candidates, max_row_tokens)
        self._asked = BlockAsk(
            self._step,
            tuple([sequence.request_id for sequence in released]),
            tuple([sequence.trusted for sequence in released]),
            self._introduce(candidates),
            request_ids,
            tuple([sequence.computed for sequence in rows]),
            tuple([sequence.scheduled for sequence in rows]),
            tuple(ends),
            tuple([sequence.unsent for sequence in rows]),
            request_ids if all_decode else tuple([sequence.request_id for sequence in running]),
            tuple([sequence.request_id for sequence in candidates]),
            token_budget,
            max_row_tokens,
            *(columns or ()),
        )
        for sequence in rows:
            sequence.unsent = ()
        return self._asked

    def _budget(self, num_decodes: int, prompt_tokens: int | None) -> int:
        """Return the maximum number of tokens of the step."""
        if prompt_tokens is None:
            return self._token_budget
        per_decode = 1 if self._speculation is None else 1 + self._speculation.max_drafts
        return min(self._token_budget, num_decodes * per_decode + prompt_tokens)

    def _introduce(self, candidates: list[Sequence]) -> tuple[Admit, ...]:
        """Return an Admit for each candidate that the KV manager does not know yet."""
        new = [sequence for sequence in candidates if not sequence.known_to_blocks]
        for sequence in new:
            sequence.known_to_blocks = True
        return tuple([Admit(one.request_id, one.prompt, one.submission.salt, one.read_cache) for one in new])

    # --- plan -----------------------------------------------------------------------------------------------------

    def plan(self, grant: BlockGrant) -> StepPlan | None:
        """Turn the granted rows into one ragged batch; None if there are none.

        Raises:
            OutOfOrderError: The grant is not that of the last ask. The state is unchanged.
        """
        check_plan(self._asked, grant)
        assert self._asked is not None
        self._ended += self._asked.released
        self._asked = None
        self._num_preempted += len(grant.preempted)
        for request_id in grant.preempted:
            self._preempt(request_id)
        rows = self._queues.find(grant.request_ids)
        grant = without_ended(grant, rows)
        rows = [sequence for sequence in rows if sequence is not None]
        if not rows:
            return None
        admissions, started = self._start(grant, rows)
        step, token_ids = RunningStep.lay_out(grant, rows, started)
        self._in_flight.append(step)
        dropped, self._to_drop = tuple(self._to_drop), []
        return StepPlan(
            grant.step,
            dropped,
            admissions,
            grant.request_ids,
            grant.starts,
            grant.counts,
            token_ids,
            tuple(step.samples),
            grant.new_blocks,
            grant.drafts,
            self._speculation.draft_limits(grant, step) if self._speculation else (),
        )

    def _preempt(self, request_id: int) -> None:
        sequence = self._queues.get(request_id)
        if sequence is None:  # Aborted after the ask.
            return
        self._drop_from_runner(sequence)
        self._queues.preempt(sequence)

    def _start(self, grant: BlockGrant, rows: list[Sequence]) -> tuple[tuple[Admission, ...], list[Sequence]]:
        """Start the admitted sequences; return their admissions, and those whose clients get a Started."""
        admissions: list[Admission] = []
        started: list[Sequence] = []
        first = len(rows) - grant.num_admitted
        for sequence, start in zip(rows[first:], grant.starts[first:], strict=True):
            self._queues.start(sequence)
            sequence.computed = start
            sequence.known_to_runner = True
            if sequence.cached_tokens is None:
                sequence.cached_tokens = start
            if not sequence.announced:
                started.append(sequence)
            tokens = tuple(sequence.tokens) if len(sequence.tokens) > len(sequence.prompt) else sequence.prompt
            admissions.append(Admission(sequence.request_id, tokens, len(sequence.prompt), sequence.params))
        return tuple(admissions), started

    # --- commit ---------------------------------------------------------------------------------------------------

    def commit(self, result: StepResult) -> Commit:
        """Apply the result of the oldest step in flight; return the events for clients and the statistics.

        Raises:
            OutOfOrderError: The result is not that of this step. The state is unchanged.
        """
        check_commit(self._asked, self._in_flight[0].grant.step if self._in_flight else None, result)
        step = self._in_flight.popleft()
        events: Events = []
        for sequence in step.started:
            if sequence.status is Status.RUNNING:
                sequence.announced = True
                events.append((sequence.request_id, Started(sequence.cached_tokens or 0)))
        if result.failed:
            self._fail_rows(step, result, events)
        for at in step.prefills:
            if step.rows[at].status is Status.RUNNING:
                self._commit_prompt(step.rows[at], step.ends[at], result, events)
        token_ids, ends = self._commit_tokens(step, result)
        num_preempted, self._num_preempted = self._num_preempted, 0
        return Commit(
            tuple(events),
            step.grant.request_ids,
            tuple(token_ids),
            result.logprobs,
            tuple(ends),
            step.stats(result, sum(map(len, token_ids)), num_preempted, self._queues),
        )

    def _fail_rows(self, step: RunningStep, result: StepResult, events: Events) -> None:
        for sequence in step.rows:
            why = result.failed.get(sequence.request_id)
            if why is not None:
                sequence.failed = True  # Also after an abort: the prefix cache must not share what it wrote.
                if sequence.status is Status.RUNNING:
                    self._end(sequence)
                    kind = InvalidRequestError if why == CONTRADICTED else RequestFailedError
                    events.append((sequence.request_id, Failed(kind(why))))

    def _commit_prompt(self, sequence: Sequence, end: int, result: StepResult, events: Events) -> None:
        """Apply the other results of a prefill: prompt logprobs, an embedding, followers that may now run."""
        if sequence.prompt_computed:  # Preempted since then; it recomputes its prompt.
            return
        request_id = sequence.request_id
        if sequence.submission.reports_progress:
            events.append((request_id, Progress(min(end, len(sequence.prompt)))))
        if sequence.wants_prompt_logprobs:
            assert result.prompt_logprobs is not None
            sequence.prompt_logprobs += result.prompt_logprobs[request_id]
        if end < len(sequence.prompt):
            return
        sequence.prompt_computed = True
        self._queues.free_followers(sequence)
        if sequence.wants_prompt_logprobs:
            events.append((request_id, PromptLogprobs(tuple(sequence.prompt_logprobs))))
            sequence.prompt_logprobs = []
        if sequence.pooling:
            assert result.embeddings is not None
            events.append((request_id, Embedding(result.embeddings[request_id])))
            events.append((request_id, Finished("stop", sequence.usage)))
            self._end(sequence)

    def _commit_tokens(self, step: RunningStep, result: StepResult) -> tuple[list[tuple[int, ...]], Events]:
        """Advance every row and append the sampled tokens; return the tokens that each row keeps, and who is done."""
        kept = list(result.token_ids)
        ends: Events = []
        running, speculation = Status.RUNNING, self._speculation
        columns = zip(step.rows, step.ends, step.samples, result.token_ids, strict=True)
        for at, (sequence, end, samples, sampled) in enumerate(columns):
            sequence.computed = end
            if not samples or sequence.status is not running:
                kept[at] = ()
                continue
            stop, tokens = sequence.stop, sequence.tokens
            if speculation is not None:
                kept[at] = sampled = stop.cut(len(tokens), sampled)  # noqa: PLW2901
                speculation.commit_drafts(step, at, len(sampled), result)
            tokens += sampled
            sequence.unsent += sampled
            if sampled[-1] in stop.stop_ids or len(tokens) >= stop.max_len:
                self._finish_if_done(sequence, sampled[-1], ends)
        return kept, ends

    def _finish_if_done(self, sequence: Sequence, token_id: int, events: Events) -> None:
        stop = sequence.stop
        reason = stop.reason(len(sequence.tokens), token_id)
        if reason is not None:
            named = token_id if reason == "stop" and token_id != stop.primary_eos else None
            events.append((sequence.request_id, Finished(reason, sequence.usage, named)))
            self._end(sequence)

    def _end(self, sequence: Sequence) -> None:
        """Remove a sequence; the next ask and plan inform the KV manager and the runner."""
        self._queues.remove(sequence)
        self._drop_from_runner(sequence)
        if sequence.known_to_blocks:
            self._to_release.append(sequence)
        else:
            self._ended.append(sequence.request_id)

    def _drop_from_runner(self, sequence: Sequence) -> None:
        if sequence.known_to_runner:
            sequence.known_to_runner = False
            self._to_drop.append(sequence.request_id)
