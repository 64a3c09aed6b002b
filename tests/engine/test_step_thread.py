from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from trio_llm.engine.step_thread import StepThread


def open_descriptors() -> int:
    """Count this process's open file descriptors."""
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def thread() -> Iterator[StepThread]:
    """A thread that is ended after the test."""
    thread = StepThread()
    yield thread
    thread.close()


async def test_calls_run_on_one_thread_of_their_own(thread: StepThread) -> None:
    """Every call runs on the same thread, which is not the event loop's, and returns its value."""
    idents = {await thread.run(threading.get_ident) for _ in range(5)}
    assert len(idents) == 1
    assert threading.get_ident() not in idents
    assert await thread.run(max, 3, 7) == 7


@pytest.mark.parametrize("error", [ValueError("x"), SystemExit(3)])
async def test_what_a_call_raises_is_raised_here(thread: StepThread, error: BaseException) -> None:
    """Any exception crosses as itself, and the thread goes on."""

    def fail() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        await thread.run(fail)
    assert caught.value is error
    assert await thread.run(abs, -1) == 1


async def test_cancelling_waits_for_the_call_and_tells_it(thread: StepThread) -> None:
    """A cancelled caller leaves only when its call has ended; the call can see that it was cancelled."""
    running, go_on = threading.Event(), threading.Event()
    seen: list[bool] = []

    def call() -> None:
        running.set()
        assert go_on.wait(30)
        seen.append(thread.cancelled)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(thread.run, call)
        await trio.to_thread.run_sync(running.wait)
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await wait_all_tasks_blocked()
            assert seen == []
            go_on.set()
    assert seen == [True]


async def test_the_next_call_gets_its_own_result(thread: StepThread) -> None:
    """The result of a call whose caller was cancelled is not taken for the next one's."""
    running, go_on = threading.Event(), threading.Event()

    def call() -> str:
        running.set()
        assert go_on.wait(30)
        return "old"

    async with trio.open_nursery() as nursery:
        nursery.start_soon(thread.run, call)
        await trio.to_thread.run_sync(running.wait)
        nursery.cancel_scope.cancel()
        go_on.set()
    assert await thread.run(str, "new") == "new"


async def test_an_idle_thread_holds_nothing(thread: StepThread) -> None:
    """What a call worked on can be freed as soon as the call is over."""

    class Big:
        pass

    big = Big()
    gone = weakref.ref(big)
    await thread.run(id, big)
    del big
    # The thread lets go before it says that it is done.
    assert gone() is None


async def test_closing_frees_thread_and_descriptor() -> None:
    """After close neither a thread nor a file descriptor is left."""
    threads, descriptors = threading.active_count(), open_descriptors()
    thread = StepThread()
    await thread.run(abs, -1)
    thread.close()
    assert threading.active_count() == threads
    assert open_descriptors() == descriptors


async def test_posted_calls_run_in_order_without_anybody_waiting(thread: StepThread) -> None:
    """Calls follow each other on the thread; each result goes to whoever waits for that call, in whatever order."""
    seen: list[int] = []

    def call(number: int) -> int:
        seen.append(number)
        return 10 * number

    waits = [thread.post(call, number) for number in range(4)]
    assert await thread.run(len, seen) == 4
    assert seen == [0, 1, 2, 3]
    assert [await waits[number]() for number in (2, 0, 3, 1)] == [20, 0, 30, 10]


async def test_a_posted_call_raises_where_it_is_waited_for(thread: StepThread) -> None:
    """An exception does not stop the calls behind it."""
    waits = [thread.post(lambda: 1 / 0), thread.post(abs, -1)]
    with pytest.raises(ZeroDivisionError):
        await waits[0]()
    assert await waits[1]() == 1


@pytest.mark.parametrize("begins", ["begins", "never-begins", "raises"])
async def test_a_started_call_has_begun(thread: StepThread, begins: str) -> None:
    """`start` returns once the call says so, or does without if it does not; the call goes on behind it."""
    go_on, calls = threading.Event(), list[str]()

    def call(begun: Callable[[], None], name: str) -> str:
        if begins == "raises":
            raise ValueError(name)
        if begins == "begins":
            calls.append(name)
            begun()
            begun()  # A step that is bisected begins several times.
        assert go_on.wait(30)
        return name

    wait = thread.start(call, "a")
    assert calls == (["a"] if begins == "begins" else [])
    go_on.set()
    with pytest.raises(ValueError, match="a") if begins == "raises" else nullcontext():
        assert await wait() == "a"
    assert await thread.run(abs, -1) == 1


async def test_closing_runs_what_was_posted() -> None:
    """A call that nobody waits for has ended when close returns, and leaves no descriptor."""
    descriptors = open_descriptors()
    thread = StepThread()
    seen: list[int] = []
    thread.post(seen.append, 1)
    thread.post(seen.append, 2)
    thread.close()
    assert seen == [1, 2]
    assert open_descriptors() == descriptors
