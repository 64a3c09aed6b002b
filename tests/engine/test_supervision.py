from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.engine.fakes import HashStub, StubRunner, continuation, open_stub
from trio_llm.config import EngineConfig
from trio_llm.core.block_manager import BlockManager
from trio_llm.engine import Engine
from trio_llm.engine.health import FAILING_AFTER_STEPS
from trio_llm.engine.recovery import launch_step
from trio_llm.engine.step_thread import StepThread
from trio_llm.engine.supervisor import run_engine
from trio_llm.errors import (
    ConfigError,
    DrainingError,
    EngineDeadError,
    InvalidRequestError,
    OverloadedError,
    RequestFailedError,
)
from trio_llm.messages import CONTRADICTED, Admission, StepPlan, StepResult
from trio_llm.params import PoolingParams, SamplingParams, Submission

PROMPT = (1, 2, 3, 4, 5)
LONG = SamplingParams(temperature=0, max_tokens=400)


def short(max_tokens: int = 8) -> SamplingParams:
    """Return parameters of a short, known answer."""
    return SamplingParams(temperature=0, max_tokens=max_tokens)


def used_blocks(engine: Engine) -> float:
    """Return the share of KV blocks that sequences own."""
    engine._metrics.catch_up()
    value = engine.registry.get_sample_value("vllm:kv_cache_usage_perc", {"model_name": "stub", "engine": "0"})
    assert value is not None
    return value


class Gate:
    """Blocks the model's thread at the n-th plan until it is opened."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.seen = 0
        self.open = threading.Event()
        self.reached = threading.Event()

    def __call__(self, plan: StepPlan) -> None:
        self.seen += 1
        if self.seen == self.at:
            self.reached.set()
            assert self.open.wait(30)


# --- an actor dies ------------------------------------------------------------------------------------------------


class Broken(BaseException):
    """What no `except Exception` catches."""


def fail_at(step: int, error: BaseException) -> Callable[[StepPlan], None]:
    """Return a hook that raises from a step on."""

    def hook(plan: StepPlan) -> None:
        if plan.step >= step:
            raise error

    return hook


@pytest.mark.parametrize("error", [Broken("no Exception"), EngineDeadError("CUDA error: an illegal access")])
async def test_a_dead_runner_ends_the_engine_with_its_exception(
    error: BaseException, autojump_clock: MockClock
) -> None:
    """What the runner cannot survive is raised from the engine's block; every reader hears EngineDeadError first."""
    heard: list[str] = []

    async def read(engine: Engine) -> None:
        async with engine.open_stream(Submission(PROMPT, LONG)) as stream:
            with pytest.raises(EngineDeadError):
                await stream.collect()
        # Its client has time to be told, too.
        await trio.lowlevel.checkpoint()
        heard.append(engine.health().status)

    async def serve() -> None:
        async with open_stub(StubRunner(hook=fail_at(5, error))) as engine, trio.open_nursery() as nursery:
            nursery.start_soon(read, engine)
            nursery.start_soon(read, engine)
            nursery.start_soon(trio.sleep_forever)

    with pytest.raises(type(error)) as caught:
        await serve()
    assert caught.value is error
    assert heard == ["dead", "dead"]


async def test_a_dead_kv_manager_ends_the_engine(monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock) -> None:
    """An exception in another actor than the runner has the same effect."""
    reserve = BlockManager.reserve

    def fail(self: BlockManager, ask: Any) -> Any:
        if ask.step == 3:
            raise ZeroDivisionError
        return reserve(self, ask)

    async def serve() -> None:
        async with open_stub() as engine, engine.open_stream(Submission(PROMPT, LONG)) as stream:
            with pytest.raises(EngineDeadError):
                await stream.collect()
            assert "ZeroDivisionError" in (engine.health().reason or "")
            await trio.sleep_forever()

    monkeypatch.setattr(BlockManager, "reserve", fail)
    with pytest.raises(ZeroDivisionError):
        await serve()


async def test_a_dead_engine_refuses(autojump_clock: MockClock) -> None:
    """Between its death and its end the engine answers every new request with EngineDeadError."""

    async def serve() -> None:
        async with open_stub(StubRunner(hook=fail_at(1, Broken()))) as engine:
            with trio.CancelScope(shield=True):
                stream = engine.open_stream(Submission(PROMPT, LONG))
                with pytest.raises(EngineDeadError):
                    await stream.collect()
                with pytest.raises(EngineDeadError):
                    engine.open_stream(Submission(PROMPT, LONG))
                with pytest.raises(EngineDeadError):
                    await engine.wait_idle()
            await trio.sleep_forever()

    with pytest.raises(Broken):
        await serve()


async def test_a_block_that_ends_by_itself_does_not_hide_the_death(autojump_clock: MockClock) -> None:
    """Whoever hears of the death and leaves the block at once still gets the actor's exception from it."""

    async def serve() -> None:
        async with open_stub(StubRunner(hook=fail_at(1, Broken()))) as engine:
            with pytest.raises(EngineDeadError):
                await engine.open_stream(Submission(PROMPT, LONG)).collect()

    with pytest.raises(Broken):
        await serve()


async def test_readers_that_do_not_listen_are_waited_for_only_so_long(autojump_clock: MockClock) -> None:
    """A stream that nobody closes delays the end of a dead engine by a second, not for ever."""

    async def serve() -> None:
        async with open_stub(StubRunner(hook=fail_at(1, Broken()))) as engine:
            engine.open_stream(Submission(PROMPT, LONG))
            await trio.sleep_forever()

    with pytest.raises(Broken):
        await serve()
    assert trio.current_time() < 2


async def test_leaving_the_block_ends_what_still_runs() -> None:
    """A stream that outlives its engine gets EngineDeadError; the runner is closed."""
    runner = StubRunner()
    async with open_stub(runner) as engine:
        stream = engine.open_stream(Submission(PROMPT, LONG))
        await stream.__anext__()
    with pytest.raises(EngineDeadError):
        await stream.collect()
    assert runner.closed


async def test_an_exception_of_the_body_is_raised_as_itself() -> None:
    """What the block raises comes out as it was, not in a group."""
    with pytest.raises(KeyError, match="mine"):
        async with open_stub():
            raise KeyError("mine")


async def test_a_model_that_is_loaded_when_nobody_wants_it_any_more_is_closed() -> None:
    """A cancellation while it loads waits for the end of that, and loses nothing of it."""
    runner, loading, unwanted = StubRunner(), threading.Event(), threading.Event()

    def load() -> StubRunner:
        loading.set()
        unwanted.wait()
        return runner

    async def serve() -> None:
        tokenizer: Any = None
        async with run_engine(EngineConfig(), load, tokenizer):
            raise AssertionError("served")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        await trio.to_thread.run_sync(loading.wait)
        nursery.cancel_scope.cancel()
        unwanted.set()
    assert runner.closed


async def test_a_model_that_does_not_load_is_an_ordinary_error() -> None:
    """What loading raises comes out as it was, and the thread ends."""

    class Unloadable(StubRunner):
        @property
        def info(self) -> Any:
            raise ConfigError("dtype", "float12", "test", "something else")

        @info.setter
        def info(self, value: Any) -> None: ...

    before = threading.active_count()
    with pytest.raises(ConfigError, match="float12"):
        async with open_stub(Unloadable(), worker=StepThread()):
            pass
    assert threading.active_count() == before


# --- one request's step fails -------------------------------------------------------------------------------------


@pytest.mark.parametrize("poisonous", range(1, 9))
@pytest.mark.parametrize("ahead", [False, True])
async def test_a_poisonous_request_fails_alone(poisonous: int, ahead: bool) -> None:
    """When a step raises, the request that makes it raise fails; the others' answers are those of a fault-free run."""
    runner = StubRunner(hook=lambda plan: 1 / 0 if poisonous in plan.request_ids and plan.step > 2 else None)
    prompts = [(i, i + 1, i + 2) * i for i in range(1, 9)]
    async with open_stub(runner, async_scheduling=ahead) as engine:
        streams = [engine.open_stream(Submission(prompt, short(12))) for prompt in prompts]
        for stream, prompt in zip(streams, prompts, strict=True):
            if stream.request_id == poisonous:
                with pytest.raises(RequestFailedError, match="ZeroDivisionError"):
                    await stream.collect()
            else:
                assert (await stream.collect()).token_ids == continuation(prompt, 12)
        await engine.wait_idle()
        assert engine.health().status == "ok"
        assert used_blocks(engine) == 0


async def test_a_passing_fault_fails_nobody() -> None:
    """A step that raises once and works in halves (memory was short) costs no request anything."""
    faults = iter([True])

    def hook(plan: StepPlan) -> None:
        if plan.step == 3 and next(faults, False):
            raise MemoryError

    async with open_stub(StubRunner(hook=hook)) as engine:
        streams = [engine.open_stream(Submission((i, 7), short())) for i in range(5)]
        for i, stream in enumerate(streams):
            assert (await stream.collect()).token_ids == continuation((i, 7), 8)


@pytest.mark.parametrize(
    ("why", "error"), [("logits are not finite", RequestFailedError), (CONTRADICTED, InvalidRequestError)]
)
async def test_what_the_runner_says_failed_fails(why: str, error: type[Exception]) -> None:
    """A row that the runner reports as failed ends its request with the runner's words, and blames who is to blame."""

    class Picky(StubRunner):
        def step(self, plan: StepPlan) -> Any:
            result = super().step(plan)
            return type(result)(result.step, result.token_ids, failed={2: why})

    async with open_stub(Picky()) as engine:
        streams = [engine.open_stream(Submission((i,), short())) for i in range(3)]
        with pytest.raises(error, match=why):
            await streams[1].collect()
        assert (await streams[2].collect()).token_ids == continuation((2,), 8)


@pytest.mark.parametrize("num_kv_blocks", [65, 12])
@pytest.mark.parametrize("ahead", [False, True])
async def test_halves_carry_what_their_rows_need(num_kv_blocks: int, ahead: bool) -> None:
    """Every third step is refused whole and runs in halves: admissions, drops and block tables still reach the model.

    With 12 blocks sequences are preempted, dropped and admitted again in the same plans.
    """

    def hook(plan: StepPlan) -> None:
        if plan.step % 3 == 0 and len(plan.request_ids) > 2:
            raise MemoryError

    runner = HashStub(num_kv_blocks=num_kv_blocks, hook=hook)
    prompts = [tuple(range(i, i + 20)) for i in range(8)]
    async with open_stub(runner, async_scheduling=ahead) as engine:
        streams = [engine.open_stream(Submission(prompt, short(30))) for prompt in prompts]
        for stream, prompt in zip(streams, prompts, strict=True):
            assert (await stream.collect()).token_ids == runner.answer(prompt, short(30))
        assert (sum(step.stats.num_preempted for step in engine.trace) > 0) == (num_kv_blocks == 12)


async def test_a_half_drops_no_row_of_the_other() -> None:
    """A sequence that one plan drops and admits again is dropped only by the half that has its row."""
    ids = (1, 2, 3, 4)
    admissions = tuple(Admission(i, (i,), 1, short()) for i in ids)
    plan = StepPlan(7, (9, *ids), admissions, ids, (0,) * 4, (1,) * 4, ids, (True,) * 4, ((),) * 4)
    parts: list[StepPlan] = []

    def launch(part: StepPlan) -> Callable[[], StepResult]:
        if len(part.request_ids) > 2:
            raise MemoryError
        parts.append(part)
        return lambda: StepResult(part.step, tuple((i,) for i in part.request_ids))

    collect = launch_step(plan, launch)
    assert len(parts) == 2, "a later plan could overtake a half"
    result = collect()
    assert result.token_ids == ((1,), (2,), (3,), (4,))
    assert [part.dropped for part in parts] == [(9, 1, 2), (9, 3, 4)]
    assert [tuple(a.request_id for a in part.admitted) for part in parts] == [(1, 2), (3, 4)]


# --- clients leave, lag and flood ---------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 2, 6])
@pytest.mark.parametrize("ahead", [False, True])
async def test_an_abort_frees_blocks_within_a_step(at: int, ahead: bool) -> None:
    """A client that leaves while its prompt is computed in chunks or while it decodes costs no step not yet planned."""
    gate = Gate(at)
    runner = StubRunner(hook=gate)
    settings = {"max_num_batched_tokens": 16, "async_scheduling": ahead}
    async with open_stub(runner, worker=(worker := StepThread()), **settings) as engine:
        stream = engine.open_stream(Submission(range(40), LONG))
        await trio.to_thread.run_sync(gate.reached.wait)
        stream.close()
        gate.open.set()
        await engine.wait_idle()
        await worker.run(int)  # What was planned meanwhile is over then, too.
        await wait_all_tasks_blocked()
        assert at <= len(runner.plans) <= at + ahead
        assert used_blocks(engine) == 0


async def test_an_abort_of_a_waiting_request_leaves_the_others_alone() -> None:
    """A request that leaves the queue was never computed, and those round it answer as ever."""
    runner = StubRunner()
    async with open_stub(runner, max_batch_size=1, max_waiting_batches=2) as engine:
        streams = [engine.open_stream(Submission((i,), short())) for i in range(3)]
        streams[1].close()
        answers = [await streams[i].collect() for i in (0, 2)]
        assert [answer.token_ids for answer in answers] == [continuation((i,), 8) for i in (0, 2)]
        assert all(streams[1].request_id not in plan.request_ids for plan in runner.plans)


async def test_a_full_queue_refuses_at_once_and_recovers() -> None:
    """The request after the last place hears OverloadedError, and places come back with the answers."""
    async with open_stub(max_batch_size=2, max_waiting_batches=1) as engine:
        streams = [engine.open_stream(Submission((i,), short())) for i in range(4)]
        with pytest.raises(OverloadedError) as caught:
            engine.open_stream(Submission(PROMPT, short()))
        assert caught.value.retry_after_s > 0
        for stream in streams:
            await stream.collect()
        async with engine.open_stream(Submission(PROMPT, short())) as stream:
            assert (await stream.collect()).token_ids == continuation(PROMPT, 8)


async def test_readers_that_never_read_cost_nothing() -> None:
    """A thousand unread streams neither hold places nor stop the engine, and close without flooding its inbox."""
    async with open_stub(max_batch_size=8, max_waiting_batches=1) as engine:
        unread = []
        for _ in range(100):
            unread += [engine.open_stream(Submission(PROMPT, short(2))) for _ in range(10)]
            await engine.wait_idle()
        for stream in unread:
            stream.close()
        async with engine.open_stream(Submission(PROMPT, short())) as stream:
            assert (await stream.collect()).token_ids == continuation(PROMPT, 8)


async def test_draining_finishes_what_was_accepted() -> None:
    """After drain new requests hear DrainingError, health says so, and accepted ones get their whole answer."""
    async with open_stub() as engine:
        stream = engine.open_stream(Submission(PROMPT, short(50)))
        engine.drain()
        assert engine.health().status == "draining"
        with pytest.raises(DrainingError):
            engine.open_stream(Submission(PROMPT, short()))
        with pytest.raises(DrainingError):
            await engine.embed(Submission(PROMPT, PoolingParams()))
        await engine.wait_idle()
        assert (await stream.collect()).token_ids == continuation(PROMPT, 50)


# --- health -------------------------------------------------------------------------------------------------------


async def test_a_step_that_hangs_shows_as_stalled_until_it_ends(mock_clock: MockClock) -> None:
    """Work without a finished step turns health to "stalled"; an idle engine never does."""
    gate = Gate(3)
    async with open_stub(StubRunner(hook=gate), worker=StepThread(), stall_after_s=30) as engine:
        mock_clock.jump(100)
        assert engine.health().status == "ok"
        stream = engine.open_stream(Submission(PROMPT, short()))
        await trio.to_thread.run_sync(gate.reached.wait)
        mock_clock.jump(29)
        assert engine.health().status == "ok"
        mock_clock.jump(2)
        assert engine.health().status == "stalled"
        gate.open.set()
        await stream.collect()
        assert engine.health().status == "ok"
        await engine.wait_idle()
        mock_clock.jump(100)
        assert engine.health().status == "ok"


async def test_the_first_step_has_more_time(mock_clock: MockClock) -> None:
    """The first step since the start may read weights and compile kernels: ten minutes, then it is stalled too."""
    gate = Gate(1)
    async with open_stub(StubRunner(hook=gate), worker=StepThread(), stall_after_s=30) as engine:
        stream = engine.open_stream(Submission(PROMPT, short()))
        await trio.to_thread.run_sync(gate.reached.wait)
        mock_clock.jump(599)
        assert engine.health().status == "ok"
        mock_clock.jump(2)
        assert engine.health().status == "stalled"
        gate.open.set()
        await stream.collect()
        assert engine.health().status == "ok"


@pytest.mark.parametrize("ahead", [False, True])
async def test_steps_that_fail_as_a_whole_show_as_failing_until_one_does_not(ahead: bool) -> None:
    """Health says so from the sixteenth step in a row in which every request failed, and takes one good row back."""
    broken = True
    runner = StubRunner(hook=lambda plan: 1 / 0 if broken else None)
    async with open_stub(runner, max_batch_size=2, async_scheduling=ahead) as engine:
        for number in range(FAILING_AFTER_STEPS):
            assert engine.health().status == "ok"
            streams = [engine.open_stream(Submission(PROMPT, short())) for _ in range(1 + number % 2)]
            for stream in streams:
                with pytest.raises(RequestFailedError):
                    await stream.collect()
            await engine.wait_idle()
        assert engine.health().status == "failing"
        assert "16 steps every request failed" in (engine.health().reason or "")
        broken = False
        assert (await engine.open_stream(Submission(PROMPT, short())).collect()).token_ids == continuation(PROMPT, 8)
        assert engine.health().status == "ok"


async def test_a_request_that_fails_beside_another_is_no_sign_of_failing() -> None:
    """As long as one row of a step succeeds, it is the others that are at fault."""
    runner = StubRunner(hook=lambda plan: 1 / 0 if set(plan.request_ids) != {1} else None)
    async with open_stub(runner) as engine, engine.open_stream(Submission(PROMPT, LONG)) as good:
        for _ in range(FAILING_AFTER_STEPS):
            with pytest.raises(RequestFailedError):
                await engine.open_stream(Submission(PROMPT, short())).collect()
        assert engine.health().status == "ok"
        await good.__anext__()


@pytest.mark.parametrize("ahead", [False, True])
async def test_cancelling_waits_for_the_running_step(ahead: bool) -> None:
    """The engine is never closed under a step: cancelled, it waits until the model's thread has finished."""
    gate = Gate(2)
    runner = StubRunner(hook=gate)
    ended = trio.Event()

    async def serve(task_status: trio.TaskStatus[trio.CancelScope]) -> None:
        with trio.CancelScope() as scope:
            async with open_stub(runner, worker=StepThread(), async_scheduling=ahead) as engine:
                engine.open_stream(Submission(PROMPT, short()))
                task_status.started(scope)
                await trio.sleep_forever()
        ended.set()

    async with trio.open_nursery() as nursery:
        scope = await nursery.start(serve)
        await trio.to_thread.run_sync(gate.reached.wait)
        scope.cancel()
        await wait_all_tasks_blocked()
        assert not ended.is_set()
        assert not runner.closed
        gate.open.set()
        await ended.wait()
    assert runner.closed


# --- admission ----------------------------------------------------------------------------------------------------


async def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    """The context is capped to what the KV pool holds; a longer prompt is refused with both numbers."""
    async with open_stub(StubRunner(num_kv_blocks=5)) as engine:
        assert engine.info.max_model_len == 64
        with pytest.raises(InvalidRequestError) as caught:
            engine.open_stream(Submission([1] * 64, short()))
        assert caught.value.code == "context_length_exceeded"
        assert "maximum context length is 64 tokens. However, your prompt resulted in 64 tokens" in str(caught.value)
        async with engine.open_stream(Submission([1] * 63, short())) as stream:
            assert len((await stream.collect()).token_ids) == 1


@pytest.mark.parametrize(("max_model_len", "reason"), [(1000, "the model's"), (100, "KV blocks hold")])
async def test_a_context_that_does_not_fit_is_a_setting_refused(max_model_len: int, reason: str) -> None:
    """An explicit max_model_len beyond the model or the pool is an error that says what would do."""
    with pytest.raises(ConfigError, match=reason):
        async with open_stub(StubRunner(num_kv_blocks=5), max_model_len=max_model_len):
            pass
