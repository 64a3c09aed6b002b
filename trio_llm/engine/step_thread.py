"""The one OS thread that owns the model: device, stream, graph capture and inference mode are all per thread.

Work goes in through a queue and comes back through an eventfd that Trio waits on: half the round trip of
`trio.to_thread.run_sync`, and always the same thread.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from typing import Any, Generic, Protocol, TypeVar, TypeVarTuple

import trio

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Worker(Protocol):
    """Something that runs synchronous calls one after another, away from the event loop."""

    async def run(self, function: Callable[[*Ts], T], *args: *Ts) -> T:
        """Return what the call returns, raise what it raises. Never returns before the call has ended."""
        ...

    def close(self) -> None: ...


class StepThread:
    """A `Worker` on a thread of its own. One call at a time, from one Trio run.

    Attributes:
        cancelled: Nobody waits any more for the result of the call that runs.
    """

    def __init__(self, name: str = "trio-llm-model") -> None:
        self.cancelled = False
        self._jobs: SimpleQueue[_Call[Any] | None] = SimpleQueue()
        self._done_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        # A daemon, so that a call that never returns cannot keep a dying process alive.
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    async def run(self, function: Callable[[*Ts], T], *args: *Ts) -> T:
        """Run one call on the thread.

        Cancellation sets `cancelled`, for calls that look at it, and waits for the call's end: abandoning it would
        let the next owner of a KV block read what the abandoned call still writes.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        call = _Call(partial(function, *args))
        self._jobs.put(call)
        try:
            await trio.lowlevel.wait_readable(self._done_fd)
        except BaseException:
            self.cancelled = True
            with trio.CancelScope(shield=True):
                await trio.lowlevel.wait_readable(self._done_fd)
            raise
        finally:
            os.eventfd_read(self._done_fd)
        return call.unwrap()

    def close(self) -> None:
        """End the thread; it must be idle."""
        self._jobs.put(None)
        self._thread.join()
        os.close(self._done_fd)

    def _work(self) -> None:
        while (call := self._jobs.get()) is not None:
            call.run()
            del call  # While the thread waits, it must not keep a step's tensors alive.
            os.eventfd_write(self._done_fd, 1)


class _Call(Generic[T]):
    """One call and, after `run`, its outcome."""

    def __init__(self, function: Callable[[], T]) -> None:
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
