from __future__ import annotations

import asyncio
import gc
import signal
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from tests.engine.fakes import StubRunner, continuation, open_stub
from trio_llm.bridge import Bridge, _Call
from trio_llm.engine import Delta, Engine, supervisor
from trio_llm.errors import EngineDeadError
from trio_llm.messages import StepPlan
from trio_llm.params import SamplingParams, Submission

PROMPT = (1, 2, 3)
LONG = SamplingParams(temperature=0, max_tokens=400)


@pytest.fixture
def bridge() -> Iterator[Bridge[Engine]]:
    """A live engine in a thread."""
    with Bridge(open_stub) as bridge:
        yield bridge


def answer(bridge: Bridge[Engine]) -> tuple[int, ...]:
    """Ask the engine for nine tokens, through the bridge."""

    async def collect() -> Delta:
        async with bridge.value.open_stream(Submission(PROMPT, SamplingParams(temperature=0, max_tokens=9))) as stream:
            return await stream.collect()

    return bridge.call(collect).token_ids


def reader(bridge: Bridge[Engine]) -> Callable[[Callable[[Delta], None]], Any]:
    """Return what puts the deltas of a long answer."""

    async def read(put: Callable[[Delta], None]) -> None:
        async with bridge.value.open_stream(Submission(PROMPT, LONG)) as stream:
            async for delta in stream:
                put(delta)

    return read


def test_a_plain_cell(bridge: Bridge[Engine]) -> None:
    """Without any loop, calls return what the engine answers; the engine lives from one to the next."""
    assert answer(bridge) == answer(bridge) == continuation(PROMPT, 9)
    assert bridge.call_sync(bridge.value.health).status == "ok"


def test_a_trio_cell(bridge: Bridge[Engine]) -> None:
    """Inside another Trio run (a cell under %autoawait trio) calls work as well."""

    async def cell() -> tuple[int, ...]:
        return answer(bridge)

    assert trio.run(cell) == continuation(PROMPT, 9)


def test_an_asyncio_cell(bridge: Bridge[Engine]) -> None:
    """Inside asyncio's loop calls work as well."""

    async def cell() -> tuple[int, ...]:
        return answer(bridge)

    assert asyncio.run(cell()) == continuation(PROMPT, 9)


def test_streaming(bridge: Bridge[Engine]) -> None:
    """Iterating yields the deltas of the whole answer."""
    tokens = [token_id for delta in bridge.iterate(reader(bridge)) for token_id in delta.token_ids]
    assert tuple(tokens) == continuation(PROMPT, 400)


def test_a_client_that_hangs_up() -> None:
    """Leaving the loop aborts the request before the iterator's close returns."""
    gate = threading.Event()

    def hold(plan: StepPlan) -> None:
        if plan.step == 20:
            assert gate.wait(30)

    from trio_llm.engine.step_thread import StepThread

    runner = StubRunner(hook=hold)
    with Bridge(lambda: open_stub(runner, worker=StepThread())) as bridge:
        deltas = bridge.iterate(reader(bridge))
        next(deltas)
        deltas.close()
        assert bridge.value._mailboxes == {}
        gate.set()
        bridge.call(bridge.value.wait_idle)
        assert len(runner.plans) <= 20


def test_errors_cross_the_bridge(bridge: Bridge[Engine]) -> None:
    """An exception is raised where the call was made, and the engine goes on."""

    async def fail() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        bridge.call(fail)
    with pytest.raises(KeyError, match="mine"):
        list(bridge.iterate(lambda put: fail()))
    assert answer(bridge) == continuation(PROMPT, 9)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Let SIGINT raise KeyboardInterrupt: a background job of a shell script starts with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_cancels_the_call(bridge: Bridge[Engine]) -> None:
    """Ctrl-C in a waiting cell raises KeyboardInterrupt there and cancels what the cell waited for."""
    cancelled = threading.Event()

    async def wait_for_ever() -> None:
        try:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            await trio.sleep_forever()
        finally:
            cancelled.set()

    with pytest.raises(KeyboardInterrupt):
        bridge.call(wait_for_ever)
    assert cancelled.is_set()
    assert answer(bridge) == continuation(PROMPT, 9)


def test_an_interrupt_before_the_call_was_sent(bridge: Bridge[Engine]) -> None:
    """A call interrupted between being noted and being sent ends as well, instead of being waited for in vain."""
    call = _Call[None]()
    bridge._calls.add(call)
    bridge._cancel(call)
    assert isinstance(call.exception(), CancelledError)


def test_closing_ends_waiting_calls_and_the_thread() -> None:
    """A call that waits when the bridge closes gets EngineDeadError, as does every later one; no thread is left."""
    threads = threading.active_count()
    bridge = Bridge(open_stub)
    waiting = threading.Event()
    caught: list[BaseException] = []

    async def wait_for_ever() -> None:
        waiting.set()
        await trio.sleep_forever()

    def cell() -> None:
        try:
            bridge.call(wait_for_ever)
        except EngineDeadError as error:
            caught.append(error)

    other = threading.Thread(target=cell)
    other.start()
    waiting.wait()
    bridge.close()
    bridge.close()
    other.join()
    assert len(caught) == 1
    with pytest.raises(EngineDeadError):
        bridge.call(trio.sleep, 0)
    assert threading.active_count() == threads


def test_what_cannot_be_opened_raises_at_once() -> None:
    """An error while opening is raised by the constructor."""

    @asynccontextmanager
    async def broken() -> AsyncIterator[None]:
        raise OSError("no such model")
        yield

    with pytest.raises(OSError, match="no such model"):
        Bridge(broken)


def test_an_engine_that_dies_tells_every_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    """After its engine died, calls raise EngineDeadError with the cause, and close raises the cause."""
    monkeypatch.setattr(supervisor, "LAST_WORDS_S", 0)

    class Broken(BaseException):
        pass

    def die(plan: StepPlan) -> None:
        raise Broken("gone")

    bridge = Bridge(lambda: open_stub(StubRunner(hook=die)))
    with pytest.raises(EngineDeadError):
        answer(bridge)
    bridge._thread.join()
    with pytest.raises(EngineDeadError) as caught:
        answer(bridge)
    assert isinstance(caught.value.__cause__, Broken)
    with pytest.raises(Broken, match="gone"):
        bridge.close()


def test_a_closed_bridge_keeps_nothing_alive() -> None:
    """What the context held is garbage after close, while the bridge itself may still be referenced."""
    runner = StubRunner()
    gone = weakref.ref(runner)
    bridge = Bridge(lambda runner=runner: open_stub(runner))  # type: ignore[misc]
    answer(bridge)
    bridge.close()
    del runner
    gc.collect()
    assert gone() is None
