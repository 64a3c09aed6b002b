"""Steps are made as long as the machine's speed allows, on a simulated processor."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import attrs
import pytest
import trio

from tests.engine.fakes import StubRunner, continuation, open_stub
from trio_llm.config import EngineConfig
from trio_llm.core.pace import StepPace
from trio_llm.engine.engine import Engine
from trio_llm.messages import StepPlan, StepResult
from trio_llm.params import SamplingParams, Submission

STEP_S, TOKEN_S = 0.03, 0.002


class SlowRunner(StubRunner):
    """A stub whose steps claim to take 30 ms and 2 ms a token, about those of a 135M model on two cores."""

    def __init__(self) -> None:
        super().__init__(num_kv_blocks=1000, max_model_len=4096)
        self.seconds: list[float] = []

    def step(self, plan: StepPlan) -> StepResult:
        self.seconds.append(STEP_S + TOKEN_S * sum(plan.counts))
        return attrs.evolve(super().step(plan), seconds=self.seconds[-1])


def plan_of(*counts: int) -> StepPlan:
    """Return a plan whose rows compute so many tokens."""
    rows = len(counts)
    ids, tokens = tuple(range(rows)), (1,) * sum(counts)
    return StepPlan(1, (), (), ids, (0,) * rows, counts, tokens, (True,) * rows, ((),) * rows)


def test_the_pace_follows_the_speed() -> None:
    """Prompt tokens settle at what fits in the target, up and down, and never fall below a minimum."""
    pace = StepPace(0.2)
    for token_s in (0.001, 0.004, 0.0001):
        for _ in range(40):
            pace.observe(plan_of(1, 1, pace.prompt_tokens), token_s * pace.prompt_tokens)
        assert pace.prompt_tokens == pytest.approx(0.2 / token_s, rel=0.05)
    for _ in range(40):
        pace.observe(plan_of(pace.prompt_tokens), 10.0)
    assert pace.prompt_tokens == 32


def test_a_machine_that_slows_down_is_noticed() -> None:
    """However fast steps of the largest size were, the pace follows when they become slow."""
    pace = StepPace(0.2)
    for seconds in (0.001, 2.0):
        for _ in range(40):
            num_tokens = min(pace.prompt_tokens, 2048)
            pace.observe(plan_of(num_tokens), seconds * num_tokens / 2048)
    assert pace.prompt_tokens == pytest.approx(0.2 * 2048 / 2.0, rel=0.05)


def test_decodes_and_short_prompts_say_nothing_about_long_ones() -> None:
    """A step that computes few prompt tokens leaves the pace as it is, however slow it was."""
    pace = StepPace(0.2, 200)
    pace.observe(plan_of(*[1] * 300), 5.0)
    pace.observe(plan_of(1, 90), 5.0)
    assert pace.prompt_tokens == 200


async def answer(engine: Engine, prompt: Sequence[int], max_tokens: int) -> None:
    """Ask and compare with what the stub always answers."""
    submission = Submission(tuple(prompt), SamplingParams(temperature=0, max_tokens=max_tokens))
    async with engine.open_stream(submission) as stream:
        assert tuple((await stream.collect()).token_ids) == tuple(continuation(prompt, max_tokens))


def prompt(number: int, length: int) -> list[int]:
    """Return a prompt that no other number has."""
    return [(number * 7 + i * (number + 1)) % 60 for i in range(length)]


async def first_tokens(target_s: float | None) -> list[float]:
    """Return when each of 64 prompts that come at once had its first token, by the simulated clock."""
    runner = SlowRunner()
    async with open_stub(
        runner, target_step_s=target_s, max_num_batched_tokens=2048, enable_prefix_caching=False
    ) as engine:
        async with trio.open_nursery() as nursery:
            for number in range(64):
                nursery.start_soon(answer, engine, prompt(number, 30), 4)
    ends = list(accumulate(runner.seconds))
    firsts: dict[int, float] = {}
    for plan, end in zip(runner.plans, ends, strict=True):
        for request_id, samples in zip(plan.request_ids, plan.samples, strict=True):
            if samples:
                firsts.setdefault(request_id, end)
    return sorted(firsts.values())


async def test_many_prompts_at_once_are_answered_one_after_the_other() -> None:
    """Half of 64 clients have their first token in little more than half the time of the last one."""
    together, paced = await first_tokens(0), await first_tokens(None)
    assert len(paced) == 64
    assert together[32] > 0.9 * together[61]
    assert paced[32] < 0.6 * paced[61]
    assert paced[61] < 1.5 * together[61]


async def test_a_long_prompt_does_not_stall_streams() -> None:
    """A prompt of 1,500 tokens that comes to four streams makes no step longer than 300 ms, by default on a CPU."""
    runner, streaming = SlowRunner(), trio.Event()

    def hook(plan: StepPlan) -> None:
        if len(plan.request_ids) == 4:
            streaming.set()

    runner.hook = hook
    async with open_stub(runner, target_step_s=None) as engine, trio.open_nursery() as nursery:
        for number in range(4):
            nursery.start_soon(answer, engine, prompt(number, 20), 100)
        await streaming.wait()
        nursery.start_soon(answer, engine, prompt(9, 1500), 4)
    assert [len(plan.request_ids) for plan in runner.plans].count(5) > 10
    assert max(runner.seconds) < 0.3


async def test_a_request_that_is_alone_is_computed_in_whole_steps() -> None:
    """Nobody waits for it, and its result does not depend on how fast the machine was."""
    runner = SlowRunner()
    async with open_stub(runner, target_step_s=None) as engine:
        await answer(engine, prompt(1, 1500), 4)
    assert [plan.counts for plan in runner.plans] == [(512,), (512,), (476,), (1,), (1,), (1,)]


def test_steps_are_shorter_on_a_cpu_but_have_room_for_every_sequence() -> None:
    """The default depends on the device and on the number of sequences; what is set is kept."""
    config = EngineConfig(model="model")
    assert [config.decided(on_gpu=on_gpu).step_tokens for on_gpu in (False, True)] == [512, 2048]
    assert EngineConfig(model="model", max_batch_size=600).decided(on_gpu=False).step_tokens == 600
    assert EngineConfig(model="model", max_num_batched_tokens=7).decided(on_gpu=True).step_tokens == 7
