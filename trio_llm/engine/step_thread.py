"""The one OS thread that owns the model: device, stream, graph capture and inference mode are all per thread.

Work goes in through a queue and comes back through an eventfd that Trio waits on: half the round trip of
`trio.to_thread.run_sync`, and always the same thread.
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


class Worker(Protocol):
    """Something that runs synchronous calls one after another, away from the event loop."""

    def post(self, function: Callable[[*Ts], T], *args: *Ts) -> Callable[[], Awaitable[T]]:
        """Queue a call behind those before it, without waiting; return what `run` would have awaited, to be used once.

        If nobody ever waits for it the call runs all the same.
        """
        ...

    async def run(self, function: Callable[[*Ts], T], *args: *Ts) -> T:
        """Return what the call returns, raise what it raises. Never returns before the call has ended."""
        ...

    def close(self) -> None: ...


class StepThread:
    """A `Worker` on a thread of its own, for one Trio run.

    Attributes:
        cancelled: Nobody waits any more for the result of a call.
    """

    def __init__(self, name: str = "trio-llm-model") -> None:
        self.cancelled = False
        self._jobs: SimpleQueue[_Call[Any] | None] = SimpleQueue()
        # One per call that is under way, used again when it is over.
        self._fds: list[int] = []
        self._idle_fds: list[int] = []
        # A daemon, so that a call that never returns cannot keep a dying process alive.
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def post(self, function: Callable[[*Ts], T], *args: *Ts) -> Callable[[], Awaitable[T]]:
        if not self._idle_fds:
            self._fds.append(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
            self._idle_fds.append(self._fds[-1])
        call = _Call(partial(function, *args), self._idle_fds.pop())
        self._jobs.put(call)
        return partial(self._wait, call)

    async def run(self, function: Callable[[*Ts], T], *args: *Ts) -> T:
        """Run one call on the thread.

        Cancellation sets `cancelled`, for calls that look at it, and waits for the call's end: abandoning it would
        let the next owner of a KV block read what the abandoned call still writes.
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
        """End the thread, after all calls that were posted."""
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
    """One call and, after `run`, its outcome; `done_fd` becomes readable then."""

    def __init__(self, function: Callable[[], T], done_fd: int) -> None:
        self.done_fd = done_fd
        self._function = function
        self._value: list[T] = []
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._value.append(self._function())
        except BaseException as error:  # noqa: BLE001 - it is raised again where the call was made
            self._error = error

    def unwrap(self) -> T:
        if self._error is not None:
            raise self._error
        return self._value.pop()
