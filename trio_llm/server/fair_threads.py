"""Worker threads for slow work of requests: parsing, rendering, tokenizing, compiling.

Callers (API keys, else peers) take turns, independent of how much work each has. One thread is reserved for short work,
and one caller's long work never takes all threads for long work: a few large requests do not delay other callers.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, TypeVar, cast

import attrs
import trio

T = TypeVar("T")

CALLER: ContextVar[str] = ContextVar("caller", default="")
"""The caller of the current task: the id of an API key, or the name of a peer."""

SHARE_OF: ContextVar[str] = ContextVar("share_of", default="")
"""The same where its share of the engine is limited; empty for this machine without a key, and for batches."""


@attrs.frozen(eq=False)
class _Place:
    """One job's claim to a thread; the limiter for `trio.to_thread`."""

    threads: FairThreads
    caller: str
    is_long: bool
    granted: trio.Event = attrs.field(factory=trio.Event)

    async def acquire_on_behalf_of(self, _borrower: object) -> None:
        await self.threads.acquire(self)

    def release_on_behalf_of(self, _borrower: object) -> None:
        """Called when the thread has ended, also if its caller was cancelled."""
        self.threads.release(self)


class FairThreads:
    """At most `num_threads` jobs at once, at most `max_long` of them long.

    One caller runs at most `max_long - 1` long jobs, so that a second caller's job need not wait for them. The defaults
    are guesses.
    """

    def __init__(self, num_threads: int = 4, max_long: int = 3) -> None:
        if not 2 <= max_long < num_threads:
            raise ValueError(f"max_long = {max_long}: at least 2, and less than num_threads = {num_threads}")
        self._num_threads = num_threads
        self._max_long = max_long
        self._num_running = 0
        self._long_running: Counter[str] = Counter()
        # Callers in the order of their turns; each one's jobs in order of arrival.
        self._waiting: OrderedDict[str, deque[_Place]] = OrderedDict()

    async def run(self, work: Callable[[], T], *, is_long: bool = True, abandon_on_cancel: bool = False) -> T:
        """Do `work` in a thread when it is the caller's turn.

        Args:
            is_long: It may take more than about 0.1 s.
            abandon_on_cancel: Cancellation abandons the thread; it occupies its place until it ends.
        """
        place = _Place(self, CALLER.get(), is_long)
        return await trio.to_thread.run_sync(work, limiter=cast(Any, place), abandon_on_cancel=abandon_on_cancel)

    async def acquire(self, place: _Place) -> None:
        """Wait for a thread."""
        self._waiting.setdefault(place.caller, deque()).append(place)
        self._grant()
        try:
            await place.granted.wait()
        except trio.Cancelled:
            if place.granted.is_set():
                self.release(place)
            else:
                self._forget(place)
            raise

    def release(self, place: _Place) -> None:
        """Give a thread back."""
        self._num_running -= 1
        if place.is_long:
            self._long_running[place.caller] -= 1
            self._long_running += Counter()  # Drops callers with no long job, so that the counter stays small.
        self._grant()

    def _grant(self) -> None:
        while self._num_running < self._num_threads and (place := self._next()) is not None:
            self._forget(place)
            if place.caller in self._waiting:
                self._waiting.move_to_end(place.caller)
            self._num_running += 1
            if place.is_long:
                self._long_running[place.caller] += 1
            place.granted.set()

    def _next(self) -> _Place | None:
        """Return the first job, in the order of turns, that may run now."""
        for places in self._waiting.values():
            for place in places:
                if not place.is_long or self._has_room_for_long(place.caller):
                    return place
        return None

    def _has_room_for_long(self, caller: str) -> bool:
        return self._long_running.total() < self._max_long and self._long_running[caller] < self._max_long - 1

    def _forget(self, place: _Place) -> None:
        places = self._waiting[place.caller]
        places.remove(place)
        if not places:
            del self._waiting[place.caller]
