"""Who gets a worker thread next: callers in turn, short work always, and never all long work of one caller's."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from trio_llm.server.fair_threads import CALLER, FairThreads


class Jobs:
    """Work that lasts until the test ends it, and what of it has begun."""

    def __init__(self, nursery: trio.Nursery, threads: FairThreads) -> None:
        self.began: list[str] = []
        self.ended: list[str] = []
        self.scopes: dict[str, trio.CancelScope] = {}
        self._nursery = nursery
        self._threads = threads
        self._gates: dict[str, threading.Event] = {}
        self._token = trio.lowlevel.current_trio_token()

    async def add(self, name: str, *, is_long: bool = True, abandon: bool = False) -> None:
        """Ask for a thread; the caller is the first letter of the name."""
        self._gates[name] = threading.Event()
        self._nursery.start_soon(self._run, name, self._work(name), is_long, abandon)
        await wait_all_tasks_blocked()

    async def end(self, name: str) -> None:
        """End a piece of work and wait until its thread is given back."""
        self._gates[name].set()
        while name not in self.ended:
            await trio.lowlevel.checkpoint()
        await wait_all_tasks_blocked()

    def end_all(self) -> None:
        for gate in self._gates.values():
            gate.set()

    def _work(self, name: str) -> Callable[[], None]:
        def work() -> None:
            self._token.run_sync_soon(self.began.append, name)
            self._gates[name].wait()

        return work

    async def _run(self, name: str, work: Callable[[], None], is_long: bool, abandon: bool) -> None:
        CALLER.set(name[0])
        with trio.CancelScope() as self.scopes[name]:
            await self._threads.run(work, is_long=is_long, abandon_on_cancel=abandon)
        self.ended.append(name)

    async def have_begun(self, *names: str) -> None:
        """Wait until just these have begun; threads say so in any order."""
        while len(self.began) < len(names):
            await trio.lowlevel.checkpoint()
        assert sorted(self.began) == sorted(names)


async def test_callers_take_turns() -> None:
    """Who came first with much work waits for who came later with little."""
    threads = FairThreads(num_threads=3, max_long=2)
    async with trio.open_nursery() as nursery:
        jobs = Jobs(nursery, threads)
        with ExitStack() as stack:
            stack.callback(jobs.end_all)
            for name in ("a1", "a2", "a3", "b1", "c1"):
                await jobs.add(name)
            await jobs.have_begun("a1", "b1")  # One of a's long ones at a time, so that b need not wait.
            await jobs.end("b1")
            await jobs.have_begun("a1", "b1", "c1")
            await jobs.end("a1")
            await jobs.have_begun("a1", "b1", "c1", "a2")
            await jobs.end("c1")
            await jobs.end("a2")
            await jobs.have_begun("a1", "b1", "c1", "a2", "a3")


async def test_short_work_never_waits_for_long() -> None:
    """However much long work there is, of whomever, one thread is left for short work."""
    async with trio.open_nursery() as nursery:
        jobs = Jobs(nursery, FairThreads(num_threads=3, max_long=2))
        with ExitStack() as stack:
            stack.callback(jobs.end_all)
            for name in ("a1", "b1", "c1", "d1"):
                await jobs.add(name)
            await jobs.add("a2", is_long=False)
            await jobs.have_begun("a1", "b1", "a2")


async def test_cancelled_work_that_waits_is_forgotten() -> None:
    """Work whose caller has left takes no thread, and leaves no trace."""
    threads = FairThreads(num_threads=3, max_long=2)
    async with trio.open_nursery() as nursery:
        jobs = Jobs(nursery, threads)
        with ExitStack() as stack:
            stack.callback(jobs.end_all)
            for name in ("a1", "a2", "a3"):
                await jobs.add(name)
            jobs.scopes["a2"].cancel()
            await wait_all_tasks_blocked()
            await jobs.end("a1")
            await jobs.have_begun("a1", "a3")
    assert not threads._waiting and not threads._long_running and threads._num_running == 0


async def test_abandoned_work_keeps_its_thread_until_it_ends() -> None:
    """Work that nobody waits for any more still counts: else there would be ever more threads."""
    async with trio.open_nursery() as nursery:
        jobs = Jobs(nursery, FairThreads(num_threads=3, max_long=2))
        with ExitStack() as stack:
            stack.callback(jobs.end_all)
            await jobs.add("a1", abandon=True)
            await jobs.have_begun("a1")
            jobs.scopes["a1"].cancel()
            await jobs.add("a2")
            assert jobs.began == ["a1"]
            await jobs.end("a1")
            await jobs.have_begun("a1", "a2")


def test_a_pool_that_cannot_be_fair_is_refused() -> None:
    """Without a thread for short work, or with long work for one caller only, there is no fairness."""
    for num_threads, max_long in ((2, 2), (2, 1)):
        with pytest.raises(ValueError, match="max_long"):
            FairThreads(num_threads=num_threads, max_long=max_long)
