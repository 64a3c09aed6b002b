"""The time machine: a record, opened at any of its steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any, Self

import attrs

from trio_llm.core.block_manager import BlockManager
from trio_llm.core.scheduler import Scheduler
from trio_llm.core.setup import CoreSetup
from trio_llm.errors import RecordError
from trio_llm.messages import BlockAsk, BlockGrant, Commit, StepPlan, StepTrace
from trio_llm.replay.capsule import cut
from trio_llm.replay.explained import explain_request
from trio_llm.replay.explanation import Explanation
from trio_llm.replay.files import Record, read
from trio_llm.replay.frames import Call, Committed
from trio_llm.replay.machine import Machine, PlannedStep
from trio_llm.replay.request import Request
from trio_llm.replay.state import State
from trio_llm.replay.what_if import History, WhatIf, what_if

# States kept to step back from, and at first the number of steps between two of them. Guesses: a state is of the size
# of the pool, and 64 steps take milliseconds.
_MAX_STATES, _EVERY = 64, 64


class Replay:
    """The real scheduler and block manager at any step of a record.

    A position is "after step n": its result is committed, and what the server did before the next result is still to
    come. `forward`, `back` and `at` move; `scheduler` and `blocks` are the objects there, to look at. They are made
    again when it moves back, so keep the replay, not them.

    Attributes:
        record: The file.
        first_step, last_step: The first and the last step that can be visited.
    """

    def __init__(self, record: Record) -> None:
        self.record = record
        header = record.header
        self._machine = Machine(header.setup, record.keys, tokens=header.tokens, state=header.state)
        self._ends = [at for at, call in enumerate(record.calls) if isinstance(call, Committed)]
        if not self._ends:
            raise RecordError(f"{record.path}: no step was recorded")
        self._steps = {self._step_at(at): number for number, at in enumerate(self._ends)}
        self.first_step, self.last_step = self._step_at(self._ends[0]), self._step_at(self._ends[-1])
        self._every = _EVERY
        self._states: dict[int, State | None] = {-1: header.state}
        self._next_call = 0
        self._number = -1
        self._planned: PlannedStep | None = None
        self._commit: Commit | None = None

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a file, or the newest one of a directory, at its start.

        Raises:
            RecordError: It is not a record, of another format, damaged, or has no step.
        """
        return cls(read(path))

    def __repr__(self) -> str:
        about = self.record.header
        tokens = "with tokens" if about.tokens else "without tokens"
        return (
            f"<Replay of {self.record.path.name} at step {self.step}: steps {self.first_step} to {self.last_step}, "
            f"{about.model}, {tokens}>"
        )

    def _repr_html_(self) -> str:
        return f"<b>{escape(repr(self)[1:-1])}</b><br>{escape(repr(self.scheduler))}<br>{escape(repr(self.blocks))}"

    # --- where it is ----------------------------------------------------------------------------------------------

    @property
    def setup(self) -> CoreSetup:
        """The configuration of the recorded engine."""
        return self.record.header.setup

    @property
    def step(self) -> int:
        """The step that was committed last; one less than the first step at the start."""
        return self.first_step - 1 if self._number < 0 else self._step_at(self._ends[self._number])

    @property
    def seconds(self) -> float:
        """Time of the position, in seconds from the start of the record."""
        if self._number >= 0:
            return self.record.calls[self._ends[self._number]].at_s
        return min(self.record.calls[0].at_s, self.record.calls[self._ends[0]].at_s)

    @property
    def scheduler(self) -> Scheduler:
        return self._machine.scheduler

    @property
    def blocks(self) -> BlockManager:
        return self._machine.blocks

    @property
    def ask(self) -> BlockAsk | None:
        """The ask of this step; None where it was in flight when the file began."""
        return None if self._planned is None else self._planned.ask

    @property
    def grant(self) -> BlockGrant | None:
        return None if self._planned is None else self._planned.grant

    @property
    def plan(self) -> StepPlan | None:
        return None if self._planned is None else self._planned.plan

    @property
    def commit(self) -> Commit | None:
        """The events of this step; None at the start."""
        return self._commit

    def state(self) -> State:
        """Return the whole state as plain data, to compare."""
        return self._machine.state()

    # --- moving ---------------------------------------------------------------------------------------------------

    def forward(self, steps: int = 1) -> Self:
        """Go on by some steps.

        Raises:
            RecordError: The record ends before, or is not consistent.
        """
        return self._go(self._number + steps)

    def back(self, steps: int = 1) -> Self:
        """Go back by some steps. Raises RecordError if the record begins later."""
        return self._go(self._number - steps)

    def at(self, step: int) -> Self:
        """Go to the position after a step. Raises RecordError if it is not in the record."""
        if step == self.first_step - 1:
            return self._go(-1)
        if step not in self._steps:
            raise RecordError(f"there is no step {step}: the record has steps {self.first_step} to {self.last_step}")
        return self._go(self._steps[step])

    def walk(self) -> Iterator[Self]:
        """Go from the start to the end, and stop after every step."""
        self._go(-1)
        while self._number + 1 < len(self._ends):
            yield self.forward()

    @property
    def known_at_start(self) -> tuple[Request, ...]:
        """The requests that were there when the file began."""
        state = self.record.header.state
        return () if state is None else tuple(one.request for one in state.sequences[: state.num_live])

    def calls(self) -> Iterator[tuple[Call, Commit | PlannedStep | None]]:
        """Make every call of the record again and yield what came of each; the replay stays where it is."""
        machine = Machine(
            self.setup, self.record.keys, tokens=self.record.header.tokens, state=self.record.header.state
        )
        for call in self.record.calls:
            yield call, machine.apply(call)

    def explain(self, request_id: int) -> Explanation:
        """Explain where the time of a request went, as the server's endpoint does; the replay stays where it is.

        `difference` is None: it is a text, and a record need not have any. A request that was there before the record
        began is not `complete`.

        Raises:
            RecordError: There is no such request.
        """
        return explain_request(self, request_id)

    def what_if(self, **changes: Any) -> WhatIf:
        """Run the same arrivals with other settings, on modelled time, and compare; the replay stays where it is.

        Args:
            changes: Settings by their names: num_kv_blocks, max_num_batched_tokens, scheduling_policy... The error for
                an unknown name lists them.
        Raises:
            RecordError: There is no such setting, a request does not fit, or the record cannot tell.
        """
        return what_if(self, changes)

    def cut(self, request_id: int, path: str | Path) -> Path:
        """Write one request, and what shared its steps, to a file that `trio_llm.replay.capsule` replays.

        Raises:
            RecordError: The request did not arrive, or did not end, within the record, or `path` is the record.
        """
        return cut(self, request_id, Path(path))

    def compare(self, generate: Callable[..., Sequence[Any]]) -> list[int]:
        """Generate the recorded answers again; return the requests whose tokens differ.

        Requests that did not reach their end by themselves, or that have a grammar, are left out.

        Args:
            generate: `LLM.generate` of the same checkpoint.
        Raises:
            RecordError: The record has no tokens.
        """
        if not self.record.header.tokens:
            raise RecordError("answers can be compared only with those of a record with tokens (--record-tokens)")
        past = History.of(self)
        ended = [
            life for life in past.lives.values() if life.reason in ("stop", "length") and life.arrived_s is not None
        ]
        lives = [life for life in ended if not life.request.pools and not life.request.constrained]
        submissions = [life.request.submission() for life in lives]
        prompts = [{"prompt_token_ids": one.prompt_token_ids} for one in submissions]
        params = [attrs.evolve(one.params, n=1) for one in submissions]
        outputs = generate(prompts, params, use_tqdm=False) if prompts else []
        return [
            life.request_id
            for life, output in zip(lives, outputs, strict=True)
            if list(output.outputs[0].token_ids) != list(past.outputs[life.request_id])
        ]

    def traces(self, first: int | None = None, last: int | None = None) -> list[StepTrace]:
        """Return the steps `first` to `last` for a picture of the schedule; go to the last one."""
        first, last = max(first or 0, self.first_step), self.last_step if last is None else last
        self.at(first - 1 if first - 1 in self._steps else self.first_step - 1)
        traces: list[StepTrace] = []
        while self.step < last:
            self.forward()
            if self.plan is not None and self._commit is not None:
                plan = self.plan
                traces.append(StepTrace(plan.request_ids, plan.starts, plan.counts, self._commit.stats, None))
        return traces

    def _go(self, number: int) -> Self:
        if not -1 <= number < len(self._ends):
            raise RecordError(f"there is no such step: the record has steps {self.first_step} to {self.last_step}")
        # With two steps in flight, a step is planned before the one before it is committed.
        known = max(at for at in self._states if at <= max(-1, number - 2) or at == -1)
        if number <= self._number or known > self._number + self._every:
            self._return_to(known)
        while self._number < number:
            self._advance()
        return self

    def _return_to(self, number: int) -> None:
        self._machine.reset(self._states[number])
        self._number = number
        self._next_call = 0 if number < 0 else self._ends[number] + 1
        self._planned = self._commit = None

    def _advance(self) -> None:
        """Make all calls up to the next commit, and that."""
        end = self._ends[self._number + 1]
        for call in self.record.calls[self._next_call : end + 1]:
            made = self._machine.apply(call)
            if isinstance(made, Commit):
                self._commit = made
        self._number += 1
        self._next_call = end + 1
        self._planned = self._machine.planned.pop(self.step, None)
        if self._number % self._every == 0 and self._number not in self._states:
            self._states[self._number] = self._machine.state()
            self._thin_out()

    def _thin_out(self) -> None:
        if len(self._states) > _MAX_STATES:
            self._every *= 2
            self._states = {at: state for at, state in self._states.items() if at < 0 or at % self._every == 0}

    def _step_at(self, at: int) -> int:
        call = self.record.calls[at]
        assert isinstance(call, Committed)
        return call.step
