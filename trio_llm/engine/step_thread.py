"""The OS thread that owns the model: device, stream, graph capture and inference mode are per thread.

Calls go in through a queue. An eventfd, on which Trio waits, signals their end. That takes half the round trip of
`trio.to_thread.run_sync`, and it is always the same thread.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Awaitable, Callable
from functools import partial
from queue import SimpleQueue
from typing import Any, Generic, Protocol, TypeVar, TypeVarTuple

import trio

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
Begun = Callable[[], None]
# Longest wait for a call to begin its work. Few steps prepare for so long.
_LONGEST_BEGINNING_S = 1e-3


class Worker(Protocol):
    """Runs synchronous calls one after another, outside the event loop."""

    def post(self, function: Callable[[*Ts], T], *args: *Ts) -> Callable[[], Awaitable[T]]:
        """Queue a call without waiting; return an async function that waits for its result, to be called once.

        The call runs even if nothing waits for it.
        """
        ...

    def start(self, function: Callable[[Begun, *Ts], T], *args: *Ts) -> Callable[[], Awaitable[T]]:
        """Post a call whose first argument says that it needs the interpreter no longer: it calls it without arguments.

        May block until then, for about a millisecond at most.
        """
        ...

    async def run(self, function: Callable[[*Ts], T], *args: *Ts) -> T:
        """Return what the call returns, or raise what it raises. Does not return before the call has ended."""
        ...

    def close(self) -> None: ...


class StepThread:
    """A `Worker` with its own thread, for one Trio run.

    Attributes:
        cancelled: A wait for a call was cancelled.
    """

    def __init__(self, name: str = "trio-llm-model") -> None:
        self.cancelled = False
        self._jobs: SimpleQueue[_Call[Any] | None] = SimpleQueue()
        # One per call in progress; reused afterwards.
        self._fds: list[int] = []
        self._idle_fds: list[int] = []
        # A daemon, so that a call that never returns does not keep the process alive.
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def post(self, function: Callable[[*Ts], T], *args: *Ts) -> Callable[[], Awaitable[T]]:
        if not self._idle_fds:
            self._fds.append(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
            self._idle_fds.append(self._fds[-1])
        call = _Call(partial(function, *args), self._idle_fds.pop())
        self._jobs.put(call)
        return partial(self._wait, call)

    def start(self, function: Callable[[Begun, *Ts], T], *args: *Ts) -> Callable[[], Awaitable[T]]:
        """Post a call, and wait until it begins its work.

        This blocks the event loop. Whatever the loop did meanwhile would take the interpreter from the thread, 0.1 ms
        at a time, and so make the step that everybody waits for longer.
        """
        begun = threading.Event()
        wait = self.post(function, begun.set, *args)
        begun.wait(_LONGEST_BEGINNING_S)
        return wait

    async def run(self, function: Callable[[*Ts], T], *args: *Ts) -> T:
        """Run one call on the thread.

        Cancellation sets `cancelled`, which calls may check, and waits for the end of the call. If it were abandoned,
        the next owner of a KV block could read what the call still writes.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        return await self.post(function, *args)()

    async def _wait(self, call: _Call[T]) -> T:
        try:
            await trio.lowlevel.wait_readable(call.done_fd)
        except BaseException:
            self.cancelled = True
            with trio.CancelScope(shield=True):
                await trio.lowlevel.wait_readable(call.done_fd)
            raise
        finally:
            os.eventfd_read(call.done_fd)
            self._idle_fds.append(call.done_fd)
        return call.unwrap()

    def close(self) -> None:
        """End the thread after all posted calls."""
        self._jobs.put(None)
        self._thread.join()
        for fd in self._fds:
            os.close(fd)

    def _work(self) -> None:
        while (call := self._jobs.get()) is not None:
            call.run()
            done_fd = call.done_fd
            del call  # While the thread waits, it must not keep a step's tensors alive.
            os.eventfd_write(done_fd, 1)


class _Call(Generic[T]):
    """One call and, after `run`, its outcome. Then `done_fd` is readable."""

    def __init__(self, function: Callable[[], T], done_fd: int) -> None:
        self.done_fd = done_fd
        self._function = function
        self._value: list[T] = []
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._value.append(self._function())
        except BaseException as error:  # noqa: BLE001 - `unwrap` raises it again
            self._error = error

    def unwrap(self) -> T:
        if self._error is not None:
            raise self._error
        return self._value.pop()
