"""The same arrivals with another configuration: the real scheduler and block manager, on modelled time.

Arrivals come at their recorded times, outputs are the recorded ones, and a step takes what the cost model says. The
recorded configuration runs in the same way, so that both sides have the same simplifications: the cache is empty at the
start, requests that were there before are left out, and one step is in flight.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from html import escape
from statistics import median
from typing import TYPE_CHECKING, Any

import attrs

from trio_llm.core.pace import StepPace
from trio_llm.core.sequence import Sequence as CoreSequence
from trio_llm.core.setup import CoreSetup
from trio_llm.errors import RecordError
from trio_llm.messages import Commit, StepPlan, StepResult, TokenLogprobs, Tokens
from trio_llm.replay.cost import CostModel
from trio_llm.replay.frames import Arrival, Committed, Leave
from trio_llm.replay.lives import Life, Lives
from trio_llm.replay.machine import Machine, PlannedStep
from trio_llm.replay.request import PLAIN, STOP

if TYPE_CHECKING:
    from trio_llm.replay.replay import Replay

CHANGEABLE = (
    "num_kv_blocks",
    "max_num_batched_tokens",
    "max_batch_size",
    "long_prefill_token_threshold",
    "scheduling_policy",
    "enable_prefix_caching",
    "max_draft_tokens",
    "lookup",
    "target_step_s",
)
"""The settings that a what-if may change; those of CoreSetup with these names."""


@attrs.frozen
class Latency:
    """One request. Times and steps are from its arrival; None if it did not get that far."""

    request_id: int
    first_token_s: float | None
    total_s: float | None
    first_token_steps: int | None
    total_steps: int | None
    num_preemptions: int
    num_cached_tokens: int

    @classmethod
    def of(cls, life: Life) -> Latency:
        arrived_s = life.arrived_s or 0.0
        return cls(
            life.request_id,
            None if life.first_token_s is None else life.first_token_s - arrived_s,
            None if life.ended_s is None else life.ended_s - arrived_s,
            None if life.first_token_step is None else life.first_token_step - life.arrived_step,
            None if life.ended_step is None else life.ended_step - life.arrived_step,
            len(life.preempted),
            life.num_cached_tokens,
        )


@attrs.frozen
class Outcome:
    """A modelled run: latencies by arrival, the number of steps, and the time of the last."""

    latencies: tuple[Latency, ...]
    num_steps: int
    total_s: float


@attrs.frozen
class History:
    """What a record says of its requests, for a run with another configuration.

    Attributes:
        calls: Arrivals, and clients that left, by time.
        lives: request_id -> its recorded life.
        outputs: request_id -> its tokens; empty in a record without tokens.
        steps: Plans with their recorded seconds.
    """

    calls: tuple[Arrival | Leave, ...]
    lives: Mapping[int, Life]
    outputs: Mapping[int, Sequence[int]]
    steps: tuple[tuple[StepPlan, float], ...]

    @classmethod
    def of(cls, replay: Replay) -> History:
        """Walk through a record."""
        lives, calls = Lives(), list[Arrival | Leave]()
        outputs: dict[int, list[int]] = {}
        plans: dict[int, StepPlan] = {}
        steps: list[tuple[StepPlan, float]] = []
        for request in replay.known_at_start:
            lives.arrived(request, None)
        for call, made in replay.calls():
            match call:
                case Arrival():
                    lives.arrived(call.request, call.at_s)
                    calls.append(call)
                case Leave():
                    lives.left(call.request_id, call.reason, call.at_s)
                    if call.reason == "abort":
                        calls.append(call)
                case Committed():
                    assert isinstance(made, Commit)
                    lives.committed(call.step, call.at_s, made)
                    for request_id, event in made.events:
                        if isinstance(event, Tokens) and replay.record.header.tokens:
                            outputs.setdefault(request_id, []).extend(event.token_ids)
                    if (plan := plans.pop(call.step, None)) is not None:
                        steps.append((plan, call.seconds))
                case _:
                    assert isinstance(made, PlannedStep)
                    lives.planned(made.ask, made.grant, call.at_s)
                    if made.plan is not None:
                        plans[call.step] = made.plan
        # Requests arrive in the order in which the scheduler read them, a little after their clients sent them.
        calls.sort(key=lambda call: call.at_s)
        return cls(tuple(calls), lives.lives, outputs, tuple(steps))


def changed(setup: CoreSetup, changes: Mapping[str, Any], *, tokens: bool) -> CoreSetup:
    """Return the setup with changes.

    Raises:
        RecordError: There is no such setting, or the record cannot tell what would have happened.
    """
    for name in changes:
        if name not in CHANGEABLE:
            raise RecordError(f"what_if({name}=...): there is no such setting; there are {', '.join(CHANGEABLE)}")
    new = attrs.evolve(setup, **changes, steps_in_flight=1)
    if new.max_draft_tokens and not tokens:
        raise RecordError("drafts depend on the tokens: record with --record-tokens, or set max_draft_tokens=0")
    if new.max_draft_tokens and new.lookup is None:
        raise RecordError("what a draft model would have drafted is not in the record: set lookup=(2, 4), for example")
    chunk = min(new.long_prefill_token_threshold or new.max_num_batched_tokens, new.max_num_batched_tokens)
    new = attrs.evolve(new, max_step_tokens=chunk)
    longest = new.block_manager().max_tokens()
    return attrs.evolve(new, max_model_len=min(new.max_model_len, longest))


@attrs.frozen
class WhatIf:
    """The same arrivals in two configurations, both on modelled time.

    Attributes:
        changes: What the second configuration changes.
        before, after: The recorded configuration, and the changed one.
        cost: The model of a step's time.
    """

    changes: Mapping[str, Any]
    before: Outcome
    after: Outcome
    cost: CostModel

    def rows(self) -> list[tuple[str, float, float]]:
        """Return (name, before, after) of what is compared: medians over the requests that both runs ended."""
        pairs = [
            (one, two)
            for one, two in zip(self.before.latencies, self.after.latencies, strict=True)
            if one.total_s is not None and two.total_s is not None
        ]
        rows: list[tuple[str, float, float]] = []
        for name, title in _COMPARED:
            values = [(getattr(one, name), getattr(two, name)) for one, two in pairs]
            known = [(one, two) for one, two in values if one is not None and two is not None]
            if known:
                rows.append((title, median(one for one, _ in known), median(two for _, two in known)))
        for title, count in (("preemptions", "num_preemptions"), ("cached prompt tokens", "num_cached_tokens")):
            before, after = (sum(getattr(one, count) for one in run.latencies) for run in (self.before, self.after))
            rows.append((title, before, after))
        rows.append(("steps", self.before.num_steps, self.after.num_steps))
        rows.append(("whole run, s", self.before.total_s, self.after.total_s))
        return rows

    def __repr__(self) -> str:
        lines = [f"{name:32} {before:12.4g} {after:12.4g}" for name, before, after in self.rows()]
        return "\n".join([f"{self._title():32} {'recorded':>12} {'changed':>12}", *lines])

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><td>{n}</td><td>{one:.4g}</td><td>{two:.4g}</td></tr>" for n, one, two in self.rows())
        head = f"<tr><th>{escape(self._title())}</th><th>recorded</th><th>changed</th></tr>"
        return f"<table>{head}{rows}</table>The model's step times are off by {100 * self.cost.error:.0f} % (median)."

    def _title(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.changes.items())


_COMPARED = (
    ("first_token_s", "first token, s"),
    ("total_s", "whole answer, s"),
    ("first_token_steps", "first token, steps"),
    ("total_steps", "whole answer, steps"),
)


def what_if(replay: Replay, changes: Mapping[str, Any]) -> WhatIf:
    """Run the arrivals of a record as it was configured, and with changes; see `Replay.what_if`."""
    header = replay.record.header
    history = History.of(replay)
    if not history.steps or not history.calls:
        raise RecordError("the record has no arrivals to run again")
    if not any(seconds for _, seconds in history.steps):
        raise RecordError("the record has no times of steps, from which to model them")
    cost = CostModel.fit(history.steps)
    # The same drafts as recorded are known only with tokens, and only by prompt look-up.
    base = header.setup
    if base.max_draft_tokens and (not header.tokens or base.lookup is None):
        base = attrs.evolve(base, max_draft_tokens=0, lookup=None)
    setups = [changed(base, {}, tokens=header.tokens), changed(base, changes, tokens=header.tokens)]
    for setup in setups:
        _check_lengths(history, setup)
    before, after = [Simulation(replay, history, setup, cost).run() for setup in setups]
    return WhatIf(dict(changes), before, after, cost)


def _check_lengths(history: History, setup: CoreSetup) -> None:
    for life in history.lives.values():
        length = life.request.num_prompt_tokens + life.num_output_tokens
        if length > setup.max_model_len:
            raise RecordError(f"request {life.request_id} has {length} tokens: this holds {setup.max_model_len}")


class Simulation:
    """One run of the recorded arrivals on modelled time."""

    def __init__(self, replay: Replay, history: History, setup: CoreSetup, cost: CostModel) -> None:
        self._machine = Machine(setup, replay.record.keys, tokens=replay.record.header.tokens)
        self._history, self._cost = history, cost
        self._calls = deque(history.calls)
        self._pace = StepPace(setup.target_step_s) if setup.target_step_s else None
        self._lives = Lives()
        self._num_steps = 0
        self._now_s = self._calls[0].at_s if self._calls else 0.0

    def run(self) -> Outcome:
        """Run to the end of all requests.

        Raises:
            RecordError: A request does not fit this configuration.
        """
        scheduler, blocks = self._machine.scheduler, self._machine.blocks
        while True:
            self._deliver()
            ask = scheduler.ask(self._prompt_tokens())
            if ask is None:
                if not self._calls:
                    break
                self._now_s = self._calls[0].at_s
                continue
            grant = blocks.reserve(ask)
            self._lives.planned(ask, grant, self._now_s)
            if (plan := scheduler.plan(grant)) is not None:
                self._step(plan)
            scheduler.take_ended()
        latencies = tuple(Latency.of(life) for life in self._lives.lives.values())
        return Outcome(latencies, self._num_steps, self._now_s)

    def _deliver(self) -> None:
        while self._calls and self._calls[0].at_s <= self._now_s:
            call = self._calls.popleft()
            self._machine.apply(call)
            if isinstance(call, Arrival):
                self._lives.arrived(call.request, call.at_s)
            else:
                self._lives.left(call.request_id, call.reason, call.at_s)

    def _prompt_tokens(self) -> int | None:
        scheduler = self._machine.scheduler
        alone = scheduler.num_running + scheduler.num_waiting <= 1
        return None if self._pace is None or alone else self._pace.prompt_tokens

    def _step(self, plan: StepPlan) -> None:
        seconds = self._cost.seconds(plan)
        if self._pace is not None:
            self._pace.observe(plan, seconds)
        self._now_s += seconds
        self._num_steps += 1
        scheduler = self._machine.scheduler
        rows = {sequence.request_id: sequence for sequence in scheduler.running}
        drafts = plan.drafts or (0,) * len(plan.counts)
        sampled = tuple(
            self._sampled(rows[request_id], num_drafts) if samples else ()
            for request_id, samples, num_drafts in zip(plan.request_ids, plan.samples, drafts, strict=True)
        )
        scored: dict[int, tuple[TokenLogprobs | None, ...]] = {
            request_id: (None,) * count
            for request_id, count in zip(plan.request_ids, plan.counts, strict=True)
            if rows[request_id].wants_prompt_logprobs
        }
        embeddings: dict[int, tuple[float, ...]] = dict.fromkeys(plan.request_ids, ())
        commit = scheduler.commit(
            StepResult(plan.step, sampled, prompt_logprobs=scored, embeddings=embeddings, seconds=seconds)
        )
        self._lives.committed(plan.step, self._now_s, commit)
        for request_id in plan.request_ids:
            self._end_early(request_id)

    def _sampled(self, sequence: CoreSequence, num_drafts: int) -> tuple[int, ...]:
        """Return what the record says comes next, and after right drafts what follows them."""
        if sequence.pooling:
            return ()
        at = len(sequence.tokens) - len(sequence.prompt)
        tokens = [self._token(sequence.request_id, at)]
        for draft in sequence.drafts[:num_drafts]:
            if draft != tokens[-1]:
                break
            at += 1
            tokens.append(self._token(sequence.request_id, at))
        return tuple(tokens)

    def _token(self, request_id: int, at: int) -> int:
        life = self._history.lives[request_id]
        output = self._history.outputs.get(request_id, ())
        if at < len(output):
            return output[at]
        # What was not recorded goes on, as far as the request does.
        return STOP if life.reason == "stop" and at + 1 == life.num_output_tokens else PLAIN

    def _end_early(self, request_id: int) -> None:
        """End what a stop string ended, what failed, and what the record does not end, after as many tokens."""
        life, recorded = self._lives.lives[request_id], self._history.lives[request_id]
        runs_on = life.reason is None and recorded.reason != "abort" and not recorded.request.pools
        if runs_on and life.num_output_tokens >= max(1, recorded.num_output_tokens):
            self._machine.scheduler.abort(request_id)
            self._lives.left(request_id, recorded.reason or "abort", self._now_s)
