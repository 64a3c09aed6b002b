"""Which sequences compute which tokens in a step, and what a step's result means for them.

A pure state machine: `ask -> (BlockManager.reserve) -> plan -> (runner) -> commit`. It knows no blocks, no clock and no
chance; the same calls in the same order give the same plans. One more step may be planned while the runner has the one
before, with tokens in it that are yet to be sampled; commits come in the order of the plans.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Seq
from itertools import repeat

from trio_llm.core.queues import Queues
from trio_llm.core.running_step import RunningStep, without_ended
from trio_llm.core.sequence import Limits, Sequence, Status
from trio_llm.core.speculator import Speculation
from trio_llm.errors import InvalidRequestError, RequestFailedError
from trio_llm.messages import (
    Admission,
    Admit,
    BlockAsk,
    BlockGrant,
    Commit,
    Embedding,
    Event,
    Failed,
    Finished,
    PoolingParams,
    PromptLogprobs,
    SamplingParams,
    Started,
    StepPlan,
    StepResult,
    Tokens,
)

Events = list[tuple[int, Event]]

# Above every priority, which are 64-bit integers.
_BACKGROUND = 2**65


class Scheduler:
    """Continuous batching with one token budget a step.

    Decodes are served first, then prefill chunks in the same batch; running sequences before waiting ones. The first
    waiting sequence that cannot have its blocks stops admission, so none is starved; where blocks run out, the last
    in policy order is preempted and computed again later.

    Args:
        max_num_batched_tokens: Tokens in one step.
        max_batch_size: Sequences that run at the same time.
        max_model_len: Prompt plus output of one sequence; at most BlockManager.max_tokens().
        eos_token_ids: The primary one first.
        policy: "fcfs", or "priority": smaller numbers first, ties by arrival.
        long_prefill_token_threshold: Tokens of one sequence in a step; 0 for no limit but the budget.
        speculation: Let sequences compute drafts beside their newest token; None for no such guesses.
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
        """Of the waiting ones, those that wait for their leader's prompt."""
        return self._queues.num_held

    @property
    def running(self) -> tuple[Sequence, ...]:
        """The running sequences in policy order; the last one is preempted first."""
        return tuple(self._queues.running)

    @property
    def waiting(self) -> tuple[Sequence, ...]:
        """The waiting sequences in the order of admission, without those held for their leader."""
        return tuple(self._queues.waiting)

    @property
    def has_work(self) -> bool:
        """Whether a step would do something, now or after those in flight: run a row or hand back blocks."""
        return bool(self._queues.running or self._queues.waiting or self._to_release)

    # --- from clients ---------------------------------------------------------------------------------------------

    def submit(
        self,
        request_id: int,
        prompt_token_ids: Seq[int],
        params: SamplingParams | PoolingParams,
        *,
        priority: int = 0,
        background: bool = False,
        salt: bytes = b"",
        leader: int | None = None,
    ) -> None:
        """Queue a sequence.

        Args:
            request_id: Not in use.
            prompt_token_ids: At least one; room must be left for a token of output.
            params: Final: what is None here is not limited.
            priority: Smaller is earlier; without meaning under fcfs.
            background: Later than all that are not, whatever the policy.
            salt: Only sequences with equal salts share KV.
            leader: Wait until this sequence's prompt is computed or it ended, so as to find it in the prefix cache.
        Raises:
            InvalidRequestError: The prompt is empty or leaves no room for the output; nothing has changed then.
        """
        assert request_id not in self._queues
        self._check_length(len(prompt_token_ids), params)
        self._num_arrivals += 1
        prompt = tuple(prompt_token_ids)
        level = (priority if self._by_priority else 0) + (_BACKGROUND if background else 0)
        key = (level, self._num_arrivals)
        limits = Limits.of(params, len(prompt), self._max_model_len, self._eos_token_ids)
        self._queues.add(Sequence(request_id, prompt, params, salt, key, limits, list(prompt)), leader)

    def abort(self, request_id: int) -> None:
        """End a sequence wherever it is; no event follows, and what steps in flight compute for it is dropped."""
        sequence = self._queues.get(request_id)
        if sequence is not None:
            self._end(sequence)

    def take_ended(self) -> tuple[int, ...]:
        """Return the sequences that were dropped altogether, blocks included, since the last call."""
        ended, self._ended = tuple(self._ended), []
        return ended

    def _check_length(self, num_tokens: int, params: SamplingParams | PoolingParams) -> None:
        if num_tokens == 0:
            raise InvalidRequestError("The prompt is empty.", param="prompt")
        limit = self._max_model_len - (0 if isinstance(params, PoolingParams) else 1)
        if num_tokens > limit:
            message = (
                f"The prompt has {num_tokens} tokens; at most {limit} fit, because "
                f"the context is {self._max_model_len} tokens, prompt and output together."
            )
            raise InvalidRequestError(message, param="prompt", code="context_length_exceeded")

    # --- ask ------------------------------------------------------------------------------------------------------

    def ask(self) -> BlockAsk | None:
        """Say what the next step needs of the KV pool; None if there is nothing to run now and nothing to release.

        One step may be in flight meanwhile, not more: an UNKNOWN token is one of the step before.
        """
        assert self._asked is None, "the step before has not been planned"
        assert len(self._in_flight) <= 1, "two steps are in flight"
        running, most = self._queues.running, self._max_row_tokens
        decodes = [sequence for sequence in running if sequence.target - sequence.scheduled == 1]
        prefills = [sequence for sequence in running if sequence.target - sequence.scheduled > 1]
        rows = decodes + prefills
        slots = min(self._max_batch_size - len(running), self._token_budget - len(decodes))  # A row costs a token.
        candidates = self._queues.waiting[: max(0, slots)]
        if not (rows or candidates or self._to_release):
            return None
        if len(rows) < len(running):  # The others end with the step in flight.
            rows += [sequence for sequence in running if sequence.target == sequence.scheduled]
        ends = [min(sequence.target, sequence.scheduled + most) for sequence in rows]
        released, self._to_release = self._to_release, []
        self._step += 1
        wishes = self._speculation and self._speculation.wishes(decodes, rows + candidates, most)
        self._asked = BlockAsk(
            self._step,
            tuple([sequence.request_id for sequence in released]),
            tuple([sequence.trusted for sequence in released]),
            self._introduce(candidates),
            tuple([sequence.request_id for sequence in rows]),
            tuple([sequence.computed for sequence in rows]),
            tuple([sequence.scheduled for sequence in rows]),
            tuple(ends),
            tuple([sequence.unsent for sequence in rows]),
            tuple([sequence.request_id for sequence in running]),
            tuple([sequence.request_id for sequence in candidates]),
            self._token_budget,
            most,
            *(wishes or ()),
        )
        for sequence in rows:
            sequence.unsent = ()
        return self._asked

    def _introduce(self, candidates: list[Sequence]) -> tuple[Admit, ...]:
        """Tell the KV manager of the candidates it has not heard of."""
        new = [sequence for sequence in candidates if not sequence.known_to_blocks]
        for sequence in new:
            sequence.known_to_blocks = True
        return tuple([Admit(one.request_id, one.prompt, one.salt, one.read_cache) for one in new])

    # --- plan -----------------------------------------------------------------------------------------------------

    def plan(self, grant: BlockGrant) -> StepPlan | None:
        """Turn the granted rows into one ragged batch; None if there are none."""
        assert self._asked is not None
        assert grant.step == self._asked.step
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
            self._speculation.reaches(grant, step) if self._speculation else (),
        )

    def _preempt(self, request_id: int) -> None:
        sequence = self._queues.get(request_id)
        if sequence is None:  # Aborted after the ask.
            return
        self._drop_from_runner(sequence)
        self._queues.preempt(sequence)

    def _start(self, grant: BlockGrant, rows: list[Sequence]) -> tuple[tuple[Admission, ...], list[Sequence]]:
        """Let the admitted sequences run; return what the runner must know of them, and whose clients know nothing."""
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
        """Advance the sequences of the first step in flight and say what their clients are to hear."""
        assert self._asked is None, "the step that was asked for has not been planned"
        step = self._in_flight.popleft()
        assert result.step == step.grant.step
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
        num_generated = self._commit_tokens(step, result, events)
        num_preempted, self._num_preempted = self._num_preempted, 0
        return Commit(tuple(events), step.stats(result, num_generated, num_preempted, self._queues))

    def _fail_rows(self, step: RunningStep, result: StepResult, events: Events) -> None:
        for sequence in step.rows:
            why = result.failed.get(sequence.request_id)
            if why is not None:
                sequence.failed = True  # Also if it was aborted meanwhile: nobody may hit what it wrote.
                if sequence.status is Status.RUNNING:
                    self._end(sequence)
                    events.append((sequence.request_id, Failed(RequestFailedError(why))))

    def _commit_prompt(self, sequence: Sequence, end: int, result: StepResult, events: Events) -> None:
        """Take in what prompt tokens yield besides KV: prompt logprobs, vectors, followers set free."""
        if sequence.prompt_computed:  # It was preempted since, and computes its prompt again.
            return
        request_id = sequence.request_id
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

    def _commit_tokens(self, step: RunningStep, result: StepResult, events: Events) -> int:
        """Advance every row and append what was sampled; return how many tokens were kept."""
        num_generated = 0
        running = Status.RUNNING
        logprobs = result.logprobs or repeat(None, len(step.rows))
        columns = zip(step.rows, step.ends, step.samples, result.token_ids, logprobs, strict=True)
        for at, (sequence, end, samples, sampled, row_logprobs) in enumerate(columns):
            sequence.computed = end
            if not samples or sequence.status is not running:
                continue
            limits = sequence.limits
            if self._speculation is not None:
                sampled = limits.cut(len(sequence.tokens), sampled)  # noqa: PLW2901
                row_logprobs = row_logprobs and row_logprobs[: len(sampled)]  # noqa: PLW2901
                self._speculation.settle(step, at, len(sampled), result)
            num_generated += len(sampled)
            sequence.tokens += sampled
            sequence.unsent += sampled
            events.append((sequence.request_id, Tokens(sampled, row_logprobs)))
            if sampled[-1] in limits.stop_ids or len(sequence.tokens) >= limits.max_len:
                self._finish_if_done(sequence, sampled[-1], events)
        return num_generated

    def _finish_if_done(self, sequence: Sequence, token_id: int, events: Events) -> None:
        limits = sequence.limits
        reason = limits.reason(len(sequence.tokens), token_id)
        if reason is not None:
            named = token_id if reason == "stop" and token_id != limits.primary_eos else None
            events.append((sequence.request_id, Finished(reason, sequence.usage, named)))
            self._end(sequence)

    def _end(self, sequence: Sequence) -> None:
        """Take a sequence out; the KV manager and the runner are told with the next ask and plan."""
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
