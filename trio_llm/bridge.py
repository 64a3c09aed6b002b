"""Keeps an async context alive across notebook cells: a Trio run in its own thread, callable from anywhere.

A cell under `%autoawait trio` is a Trio run by itself and ends with all its tasks; a plain cell has no loop; an
asyncio cell has the wrong one. A Bridge works from all three, and from scripts: `LLM` stands on it.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Awaitable, Callable, Generator
from concurrent.futures import CancelledError, Future, wait
from contextlib import AbstractAsyncContextManager, suppress
from functools import partial
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, TypeVarTuple

import trio

from trio_llm.errors import EngineDeadError

T = TypeVar("T")
R = TypeVar("R")
Ts = TypeVarTuple("Ts")


class Bridge(Generic[T]):
    """Keeps an async context open in a Trio thread until `close`.

    A call blocks only its caller. It may come from any thread except the bridge's own. An interrupt (Ctrl-C,
    the notebook's stop button) cancels the call in the thread. What the context raises is raised by `close` and,
    if it ended by itself, as the cause of EngineDeadError by every call from then on.

    Attributes:
        value: What the context yielded; touch it only through calls.
    """

    value: T

    def __init__(self, open_context: Callable[[], AbstractAsyncContextManager[T]]) -> None:
        self._scope = trio.CancelScope()
        self._calls: set[_Call[Any]] = set()
        self._lock = threading.Lock()
        self._entered = threading.Event()
        self._up: Future[None] = Future()
        self._ended: Future[None] = Future()
        self._closed = False
        self._thread = threading.Thread(target=self._run, args=(open_context,), name="trio-llm-bridge", daemon=True)
        self._thread.start()
        try:
            self._up.result()
        except BaseException:
            self._stop()
            raise
        # A notebook that never closes it still ends cleanly.
        atexit.register(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def call(self, function: Callable[[*Ts], Awaitable[R]], *args: *Ts) -> R:
        """Run an async function in the bridge's thread and return what it returns, or raise what it raises."""
        call = _Call[R]()
        try:
            self._start(call, partial(function, *args))
            return call.result()
        finally:
            self._cancel(call)

    def call_sync(self, function: Callable[[*Ts], R], *args: *Ts) -> R:
        """Run a synchronous function in the bridge's thread, where it may touch `value`."""

        async def run() -> R:
            return function(*args)

        return self.call(run)

    def iterate(self, produce: Callable[[Callable[[R], None]], Awaitable[None]]) -> Generator[R, None, None]:
        """Yield the items that an async function puts, while it runs.

        The function runs ahead of its reader. Closing the iterator, or leaving its loop, cancels it.
        """
        ready: SimpleQueue[tuple[R] | None] = SimpleQueue()
        call = _Call[None]()
        call.add_done_callback(lambda _: ready.put(None))
        try:
            self._start(call, partial(produce, lambda item: ready.put((item,))))
            while (item := ready.get()) is not None:
                yield item[0]
            call.result()
        finally:
            self._cancel(call)

    def start(self, function: Callable[[*Ts], Awaitable[R]], *args: *Ts) -> Future[R]:
        """Start an async function in the bridge's thread and return the future of its result, for other event loops.

        The future's own `cancel` does nothing; `abandon` cancels the function.
        """
        call = _Call[R]()
        call.set_running_or_notify_cancel()
        self._start(call, partial(function, *args))
        return call

    def abandon(self, started: Future[Any]) -> None:
        """Cancel a function that was started, unless it has ended. Does not wait for its end."""
        assert isinstance(started, _Call)
        self.post(self._abandon, started)

    def post(self, function: Callable[[*Ts], object], *args: *Ts) -> None:
        """Run a synchronous function in the bridge's thread, soon and in order. It must not raise."""
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(function, *args)

    def when_ended(self, function: Callable[[], object]) -> None:
        """Call a function in the bridge's thread when the context has ended, closed or by itself."""
        self._ended.add_done_callback(lambda _: function())

    def close(self) -> None:
        """Leave the context and end the thread. Raises what the context raised; doing it again does nothing."""
        if self._closed:
            return
        self._closed = True
        self._stop()
        atexit.unregister(self.close)
        self._ended.result()

    def _stop(self) -> None:
        self._entered.wait()
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._scope.cancel)
        self._thread.join()

    def _start(self, call: _Call[R], function: Callable[[], Awaitable[R]]) -> None:
        assert threading.current_thread() is not self._thread, "a call from the bridge's thread would wait for itself"
        with self._lock:
            if self._ended.done():
                raise self._dead()
            self._calls.add(call)
        # If the run ends before that, `_run` answers the call.
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._spawn, call, function)

    def _cancel(self, call: _Call[Any]) -> None:
        """Cancel a call whose caller has stopped waiting, and wait until it has cleaned up."""
        if call in self._calls and not call.done():
            self.post(self._abandon, call)
            wait((call,))

    def _dead(self) -> EngineDeadError:
        error = EngineDeadError("The engine has ended.")
        error.__cause__ = self._ended.exception()
        return error

    # --- in the bridge's thread -----------------------------------------------------------------------------------

    def _run(self, open_context: Callable[[], AbstractAsyncContextManager[T]]) -> None:
        error: BaseException | None = None
        try:
            trio.run(self._main, open_context)
        except BaseException as raised:  # noqa: BLE001 - whoever opened or closes the bridge gets it
            error = raised
        with self._lock:
            _settle(self._ended, error)
            calls = list(self._calls)
        _settle(self._up, error)
        for call in calls:
            _settle(call, self._dead())

    async def _main(self, open_context: Callable[[], AbstractAsyncContextManager[T]]) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._entered.set()
        with self._scope:
            async with open_context() as self.value, trio.open_nursery() as self._nursery:
                self._up.set_result(None)
                await trio.sleep_forever()

    def _spawn(self, call: _Call[R], function: Callable[[], Awaitable[R]]) -> None:
        # If the nursery has closed, `_run` answers the call.
        with suppress(RuntimeError):
            self._nursery.start_soon(self._perform, call, function)
            call.spawned = True

    def _abandon(self, call: _Call[Any]) -> None:
        call.scope.cancel()
        if not call.spawned and not call.done():  # The interrupt came before it was sent here.
            call.set_exception(CancelledError())

    async def _perform(self, call: _Call[R], function: Callable[[], Awaitable[R]]) -> None:
        try:
            with call.scope:
                call.set_result(await function())
            if not call.done():
                call.set_exception(CancelledError())
        except Exception as error:  # noqa: BLE001 - it is raised again where the call was made
            call.set_exception(error)
        finally:
            # A task cancelled because the bridge closes leaves its call to `_run`.
            if call.done():
                self._calls.discard(call)


class _Call(Future[R]):
    """A call in progress; cancelling its scope ends it."""

    def __init__(self) -> None:
        super().__init__()
        self.spawned = False
        self.scope = trio.CancelScope()


def _settle(future: Future[Any], error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
