"""Steps launched before the ones before them are collected, with tokens that only the device knows."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import attrs
import pytest
import torch

from tests.model_runner.conftest import Golden
from tests.model_runner.drive import Params, in_halves, run
from tests.model_runner.test_runner import GREEDY, NAME, VARIED
from trio_llm.messages import UNKNOWN, Admission, StepPlan, StepResult
from trio_llm.model.device.device import Cpu, Mark
from trio_llm.model.runner import Runner
from trio_llm.params import SamplingParams

Collect = Callable[[], StepResult]


@pytest.fixture
def runner(runner_of: Callable[..., Runner]) -> Runner:
    """Return a runner without sequences."""
    runner = runner_of(NAME)
    for request_id in list(runner._rows._row_of):
        runner._drop(request_id)
    return runner


@pytest.fixture
def plans(runner: Runner, golden: Callable[[str], Golden], monkeypatch: pytest.MonkeyPatch) -> list[StepPlan]:
    """Return the plans of a run of sixteen requests that want sixteen things."""
    requests: list[tuple[list[int], Params]] = list(zip(golden(NAME).prompts, VARIED * 2, strict=True))
    plans: list[StepPlan] = []
    run(runner, requests, chunk=7, batch_size=5, watch=lambda _, plan: plans.append(plan))
    return plans


def forgetful(plans: list[StepPlan]) -> list[StepPlan]:
    """Write UNKNOWN for what the step before sampled, as if each plan had been made too early to know it."""
    forgotten = [plans[0]]
    for before, plan in pairwise(plans):
        sampled = {one for one, samples in zip(before.request_ids, before.samples, strict=True) if samples}
        sampled -= {admission.request_id for admission in plan.admitted}
        token_ids, at = list(plan.token_ids), 0
        for request_id, count in zip(plan.request_ids, plan.counts, strict=True):
            if request_id in sampled:
                assert count == 1
                token_ids[at] = UNKNOWN
            at += count
        forgotten.append(attrs.evolve(plan, token_ids=tuple(token_ids)))
    return forgotten


def same(ones: list[StepResult], others: list[StepResult]) -> bool:
    """Compare all that clients would see, to the bit."""
    return [attrs.evolve(one, seconds=0) for one in ones] == [attrs.evolve(other, seconds=0) for other in others]


def run_ahead(runner: Runner, plans: list[StepPlan]) -> list[StepResult]:
    """Launch every step before the one before it is collected, on a thread that does nothing else."""
    results: list[StepResult] = []
    waiting: list[Collect] = []

    def collect() -> None:
        results.append(waiting.pop(0)())

    for plan in plans:
        waiting.append(runner.launch(plan))
        if len(waiting) == 2:
            thread = threading.Thread(target=collect)
            thread.start()
            thread.join()
    collect()
    return results


def outputs_of(plans: Sequence[StepPlan], results: Sequence[StepResult], num_requests: int) -> list[list[int]]:
    """Return the tokens that each request got, from the results of its plans."""
    outputs: list[list[int]] = [[] for _ in range(num_requests)]
    for plan, result in zip(plans, results, strict=True):
        for request_id, token_ids in zip(plan.request_ids, result.token_ids, strict=True):
            outputs[request_id] += token_ids
    return outputs


def drop_all(runner: Runner) -> None:
    """Forget every sequence."""
    for request_id in list(runner._rows._row_of):
        runner._drop(request_id)


def test_a_plan_need_not_know_what_the_step_before_sampled(runner: Runner, plans: list[StepPlan]) -> None:
    """Tokens taken over on the device give the results of plans that name them, penalties and bad words included."""
    drop_all(runner)
    expected = [runner.step(plan) for plan in plans]
    forgotten = forgetful(plans)
    assert sum(plan.token_ids.count(UNKNOWN) for plan in forgotten) > 50
    drop_all(runner)
    assert same(run_ahead(runner, forgotten), expected)


def test_halves_of_a_step_find_the_same_tokens(runner: Runner, plans: list[StepPlan]) -> None:
    """A step that is run again in halves reads what the step before it sampled, not what its first run did."""
    drop_all(runner)
    expected = [runner.step(plan).token_ids for plan in plans]
    drop_all(runner)
    again: list[tuple[tuple[int, ...], ...]] = []
    for plan in forgetful(plans):
        runner.step(plan)
        again.append(in_halves(runner, plan).token_ids)
    assert again == expected


def start(request_id: int, params: SamplingParams, prompt: tuple[int, ...] = (5, 6, 7)) -> dict[str, Any]:
    """Return what a plan says of a new sequence."""
    return {
        "admitted": (Admission(request_id, prompt, len(prompt), params),),
        "new_blocks": (((0, (2 * request_id + 1, 2 * request_id + 2)),),),
    }


def plan(step: int, request_ids: tuple[int, ...], start: int, token_ids: tuple[int, ...], **more: Any) -> StepPlan:
    """Return a plan of equal rows."""
    rows = len(request_ids)
    count = len(token_ids) // rows
    admitted, new_blocks = more.get("admitted", ()), more.get("new_blocks", ((),) * rows)
    return StepPlan(
        step, (), admitted, request_ids, (start,) * rows, (count,) * rows, token_ids, (True,) * rows, new_blocks
    )


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(temperature=0, repetition_penalty=1.3)])
def test_a_row_that_failed_harms_nobody_in_the_step_after(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, params: SamplingParams
) -> None:
    """A plan made before a row's failure was known runs; the other rows get what they would have got."""
    parts = [start(request_id, params) for request_id in (0, 1)]
    both = {key: sum((part[key] for part in parts), ()) for key in parts[0]}
    runner.step(plan(1, (0, 1), 0, (5, 6, 7) * 2, **both))
    healthy = runner.step(plan(2, (0, 1), 3, (UNKNOWN, UNKNOWN)))
    forward = runner._model.forward

    def poisoned(batch: Any, kv: Any) -> torch.Tensor:
        hidden = forward(batch, kv)
        hidden[2] = torch.nan
        return hidden

    drop_all(runner)
    with monkeypatch.context() as patch:
        patch.setattr(runner._model, "forward", poisoned)
        assert runner.launch(plan(1, (0, 1), 0, (5, 6, 7) * 2, **both))().failed.keys() == {0}
    after = runner.step(plan(2, (0, 1), 3, (UNKNOWN, UNKNOWN)))
    assert after.token_ids[1] == healthy.token_ids[1]


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(temperature=0, repetition_penalty=1.3)])
def test_a_row_whose_launch_raised_does_not_make_the_next_launch_raise(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, params: SamplingParams
) -> None:
    """The step before sampled nothing for it: its row in the next plan is for nobody, and harms no other row."""
    parts = [start(request_id, params) for request_id in (0, 1)]
    drop_all(runner)
    runner.step(plan(1, (1,), 0, (5, 6, 7), **parts[1]))
    healthy = runner.step(plan(2, (1,), 3, (UNKNOWN,)))
    drop_all(runner)
    with monkeypatch.context() as patch:
        patch.setattr(runner._model, "forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            runner.launch(plan(1, (0,), 0, (5, 6, 7), **parts[0]))
    runner.step(plan(1, (1,), 0, (5, 6, 7), **parts[1]))
    after = runner.step(plan(2, (0, 1), 3, (UNKNOWN, UNKNOWN)))
    assert after.token_ids[1] == healthy.token_ids[0]


@attrs.frozen
class Noted:
    """A mark that notes being waited for."""

    number: int
    waited: list[int]

    def wait(self) -> None:
        self.waited.append(self.number)

    def seconds_since(self, earlier: Mark) -> float:
        return 0.0


class Watched(Cpu):
    """A device whose marks are numbered."""

    def __init__(self) -> None:
        self.num_marks = 0
        self.waited: list[int] = []

    def mark(self) -> Mark:
        self.num_marks += 1
        return Noted(self.num_marks - 1, self.waited)


@pytest.mark.parametrize(("params", "waited"), [(GREEDY, []), (SamplingParams(temperature=0, presence_penalty=1), [1])])
def test_a_launch_waits_only_for_those_who_look_back(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, params: SamplingParams, waited: list[int]
) -> None:
    """A launch waits for nothing, but for the end of the step before (its second mark) where a row is penalised."""
    device = Watched()
    monkeypatch.setattr(runner, "_device", device)
    first = runner.launch(plan(1, (0,), 0, (5, 6, 7), **start(0, params)))
    second = runner.launch(plan(2, (0,), 3, (UNKNOWN,)))
    assert device.waited == waited
    first(), second()
    assert device.waited == [*waited, 1, 3]
