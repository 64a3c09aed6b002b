"""The engine with two steps in flight: what overlaps, what may not, and that answers stay the same."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import attrs
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.engine.fakes import FakeTokenizer, HashStub, StubRunner, continuation, open_stub
from tests.engine.test_step_thread import open_descriptors
from trio_llm.config import EngineConfig
from trio_llm.engine import Engine, Stream
from trio_llm.engine.health import FAILING_AFTER_STEPS
from trio_llm.engine.step_thread import StepThread
from trio_llm.engine.supervisor import run_engine
from trio_llm.errors import EngineDeadError, RequestFailedError
from trio_llm.messages import StepPlan, StepResult
from trio_llm.params import SamplingParams, Submission

PROMPT = (1, 2, 3, 4, 5)


def greedy(max_tokens: int = 8, **more: object) -> SamplingParams:
    """Return parameters whose answer is known."""
    return SamplingParams(temperature=0, max_tokens=max_tokens, **more)


class SlowDevice(StubRunner):
    """Launches at once; a result is there when the test lets the device get so far."""

    def __init__(self) -> None:
        super().__init__()
        self.launched: list[int] = []
        self.threads: set[str] = set()
        self._done = threading.Semaphore(0)
        self.changed = threading.Event()

    def launch(self, plan: StepPlan, begun: Callable[[], None]) -> Callable[[], StepResult]:
        """Do the step, and keep its result back."""
        result = super().launch(plan, begun)
        self.launched.append(plan.step)
        self.changed.set()

        def wait() -> StepResult:
            self.threads.add(threading.current_thread().name)
            assert self._done.acquire(timeout=30)
            return result()

        return wait

    def let(self, steps: int) -> None:
        """Let the device finish so many steps."""
        for _ in range(steps):
            self._done.release()

    async def launches(self, count: int) -> None:
        """Wait until so many steps were launched."""
        while len(self.launched) < count:
            self.changed.clear()
            if len(self.launched) < count:
                assert await trio.to_thread.run_sync(self.changed.wait, 30)


def run(runner: StubRunner, *, ahead: bool | None = True) -> object:
    """Open an engine with the threads of a server."""
    return run_engine(EngineConfig(async_scheduling=ahead), lambda: runner, FakeTokenizer(), worker=StepThread())


@pytest.mark.parametrize(
    ("ahead", "on_gpu", "in_flight"),
    [(False, False, 1), (False, True, 1), (True, False, 2), (True, True, 2), (None, False, 1), (None, True, 2)],
)
async def test_the_next_step_is_launched_while_the_first_runs(ahead: bool | None, on_gpu: bool, in_flight: int) -> None:
    """Where it is asked for, or unsaid on a GPU, one step more than the device has finished is launched, never two."""
    runner = SlowDevice()
    runner.info = attrs.evolve(runner.info, on_gpu=on_gpu)
    async with run(runner, ahead=ahead) as engine:
        stream = engine.open_stream(Submission(PROMPT, greedy(6)))
        for done in range(5):
            await runner.launches(min(done + in_flight, 6))
            await wait_all_tasks_blocked()
            assert len(runner.launched) == min(done + in_flight, 6)
            runner.let(1)
        runner.let(1)
        assert (await stream.collect()).token_ids == continuation(PROMPT, 6)
    assert runner.threads == {"trio-llm-collector" if in_flight == 2 else "trio-llm-model"}


class CloseBeforeTold(trio.abc.Instrument):
    """Closes streams when the scheduler knows that they ended and they do not: it asks for the next step's blocks."""

    def __init__(self, engine: Engine, streams: Sequence[Stream]) -> None:
        self._engine, self._streams = engine, streams

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if "manage_blocks" in task.name and self._engine.health().num_running == 1:
            for stream in self._streams:
                stream.close()


async def test_clients_that_leave_as_they_end_take_no_place_in_the_inbox_from_the_next() -> None:
    """An abort that comes too late is still unread when its ticket goes to somebody else, who leaves at once, too."""
    runner = SlowDevice()
    config = EngineConfig(async_scheduling=False, max_batch_size=3, max_waiting_batches=0)
    async with run_engine(config, lambda: runner, FakeTokenizer(), worker=StepThread()) as engine:
        lasting, *short = [engine.open_stream(Submission((i, 7), greedy(count))) for i, count in enumerate((8, 1, 1))]
        instrument = CloseBeforeTold(engine, short)
        trio.lowlevel.add_instrument(instrument)
        runner.let(1)
        await runner.launches(2)
        await wait_all_tasks_blocked()
        trio.lowlevel.remove_instrument(instrument)
        for i in range(2):
            engine.open_stream(Submission((i, 8), greedy())).close()
        lasting.close()
        runner.let(1)
        await engine.wait_idle()


async def test_a_fault_is_dealt_with_before_the_next_step_is_launched() -> None:
    """The halves of a step that raised run before the step that was planned behind it, on the same thread."""
    steps: list[int] = []

    def hook(plan: StepPlan) -> None:
        steps.append(plan.step)
        if plan.step == 3 and len(plan.request_ids) > 1:
            raise MemoryError

    async with open_stub(StubRunner(hook=hook), worker=StepThread(), async_scheduling=True) as engine:
        streams = [engine.open_stream(Submission((i, 7), greedy())) for i in range(4)]
        for i, stream in enumerate(streams):
            assert (await stream.collect()).token_ids == continuation((i, 7), 8)
    assert steps == sorted(steps)
    assert steps.count(3) == 7


async def test_rows_of_requests_that_failed_do_not_make_a_failing_engine_look_well(autojump_clock: MockClock) -> None:
    """Where every prompt fails, the decode that was planned behind each says nothing, although nothing is raised."""

    def hook(plan: StepPlan) -> None:
        if plan.admitted:
            raise MemoryError

    async with open_stub(StubRunner(hook=hook), async_scheduling=True) as engine:
        for i in range(FAILING_AFTER_STEPS):
            assert engine.health().status == "ok"
            with pytest.raises(RequestFailedError):
                await engine.open_stream(Submission((i, 7), greedy())).collect()
        await engine.wait_idle()
        assert engine.health().status == "failing"


async def test_a_device_that_dies_ends_the_engine(autojump_clock: MockClock) -> None:
    """What waiting for a result raises is nobody's row's fault: later steps were built on it."""

    class Dying(StubRunner):
        def launch(self, plan: StepPlan, begun: Callable[[], None]) -> Callable[[], StepResult]:
            wait = super().launch(plan, begun)
            return wait if plan.step < 3 else lambda: 1 / 0

    async def serve() -> None:
        async with (
            open_stub(Dying(), async_scheduling=True) as engine,
            engine.open_stream(Submission(PROMPT, greedy())) as stream,
        ):
            with pytest.raises(EngineDeadError):
                await stream.collect()
            await trio.sleep_forever()

    with pytest.raises(ZeroDivisionError):
        await serve()


async def test_closing_waits_for_both_steps_and_leaves_nothing() -> None:
    """Cancelled with two steps in flight, the engine closes its runner only when both were launched and one waited for.

    Neither a thread nor a file descriptor is left.
    """
    descriptors = open_descriptors()
    runner = SlowDevice()
    ended = trio.Event()

    async def serve(task_status: trio.TaskStatus[trio.CancelScope]) -> None:
        with trio.CancelScope() as scope:
            async with run(runner) as engine:
                engine.open_stream(Submission(PROMPT, greedy()))
                task_status.started(scope)
                await trio.sleep_forever()
        ended.set()

    async with trio.open_nursery() as nursery:
        scope = await nursery.start(serve)
        await runner.launches(2)
        scope.cancel()
        await wait_all_tasks_blocked()
        assert not ended.is_set()
        assert not runner.closed
        runner.let(1)
        await ended.wait()
    assert runner.closed
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("trio-llm")]
    assert open_descriptors() == descriptors


@pytest.mark.parametrize("num_kv_blocks", [65, 12])
@pytest.mark.parametrize("caching", [False, True])
async def test_answers_do_not_depend_on_what_is_in_flight(num_kv_blocks: int, caching: bool) -> None:
    """Stop ids, stop strings, aborts, preemption and the cache: with two steps in flight as with one."""
    prompts = [tuple(range(i, i + 20)) for i in range(8)]
    answers = []
    for ahead in (False, True):
        runner = HashStub(num_kv_blocks=num_kv_blocks)
        settings = {"enable_prefix_caching": caching, "async_scheduling": ahead, "max_num_batched_tokens": 48}
        async with open_stub(runner, **settings) as engine:
            wanted = [greedy(30, stop_token_ids=(number,), stop=("7", "Q")) for number in range(8)]
            streams = [
                engine.open_stream(Submission(prompt, params)) for prompt, params in zip(prompts, wanted, strict=True)
            ]
            gone = engine.open_stream(Submission(prompts[0], greedy(30)))
            await gone.__anext__()
            gone.close()
            deltas = [await stream.collect() for stream in streams]
            answers.append([(delta.token_ids, delta.text, delta.finish_reason, delta.usage) for delta in deltas])
            await engine.wait_idle()
    (one_at_a_time, ahead) = answers
    assert [answer[:3] for answer in one_at_a_time] == [answer[:3] for answer in ahead]
    assert {answer[2] for answer in ahead} == {"stop", "length"}


async def test_a_waiting_request_that_does_not_fit_yet_is_not_a_stuck_scheduler() -> None:
    """While the last step of the only running request is in flight there is nothing to plan, and that is fine."""
    async with open_stub(StubRunner(num_kv_blocks=4), async_scheduling=True) as engine:
        streams = [engine.open_stream(Submission(range(40), greedy(4))) for _ in range(3)]
        for stream in streams:
            assert (await stream.collect()).token_ids == continuation(range(40), 4)


async def test_a_poisonous_request_fails_once() -> None:
    """Its row in the step that was planned meanwhile fails too; the client hears of one failure."""
    runner = StubRunner(hook=lambda plan: 1 / 0 if 2 in plan.request_ids and plan.step > 3 else None)
    async with open_stub(runner, async_scheduling=True) as engine:
        streams = [engine.open_stream(Submission((i,), greedy())) for i in range(3)]
        with pytest.raises(RequestFailedError):
            await streams[1].collect()
        for i in (0, 2):
            assert (await streams[i].collect()).token_ids == continuation((i,), 8)
        await engine.wait_idle()
        assert engine.health().status == "ok"
