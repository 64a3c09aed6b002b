"""The events of one request, on their way from the scheduler actor to the request's reader.

A list and a parked task. A memory channel costs twice as much per event, and cannot wake one reader for many requests.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from trio_llm.errors import EngineDeadError
from trio_llm.messages import Event, FinishReason


class Mailbox:
    """Holds events until their reader takes them, so the engine never waits for the reader. One reader at a time.

    Args:
        on_close: Called once, with the reason to abort the request, or None if it has ended.

    Attributes:
        wakeup: Where the reader waits. Mailboxes with the same reader may share one.
        ended: No event will be put any more.
    """

    def __init__(self, on_close: Callable[[FinishReason | None], None]) -> None:
        self.wakeup = trio.lowlevel.ParkingLot()
        self.ended = False
        self._events: list[Event] = []
        self._on_close: Callable[[FinishReason | None], None] | None = on_close

    # --- the engine's end -----------------------------------------------------------------------------------------

    def put(self, event: Event) -> None:
        """Add an event and wake the reader. If the reader has left, its Abort is on its way and the event is lost."""
        if self._on_close is not None:
            self._events.append(event)
            self._wake()

    def end(self) -> None:
        """Put no more events."""
        self.ended = True
        self._wake()

    # --- the reader's end -----------------------------------------------------------------------------------------

    def take(self) -> list[Event]:
        """Return the events that were put since the last call, without waiting.

        Raises:
            EngineDeadError: There are none, and there will be none.
            trio.ClosedResourceError: The mailbox is closed.
        """
        if self._on_close is None:
            raise trio.ClosedResourceError
        if self.ended and not self._events:
            raise EngineDeadError
        events, self._events = self._events, []
        return events

    async def receive(self) -> list[Event]:
        """Wait for an event; return it and all events put after it. Raises what `take` raises."""
        if self._events:
            await trio.lowlevel.checkpoint()
        while not (events := self.take()):
            await self.wakeup.park()
        return events

    def close(self, reason: FinishReason | None) -> None:
        """Stop reading. `reason` is why the rest is not wanted; it is ignored if the request has ended."""
        if self._on_close is None:
            return
        on_close, self._on_close = self._on_close, None
        self._events = []
        self._wake()
        on_close(None if self.ended else reason)

    def _wake(self) -> None:
        if self.wakeup:
            self.wakeup.unpark_all()
