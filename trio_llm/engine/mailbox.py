"""Where a request's events arrive: the receiving end of its reply channel, and how its reader leaves."""

from __future__ import annotations

from collections.abc import Callable

import trio

from trio_llm.errors import EngineDeadError
from trio_llm.messages import Event, FinishReason


class Mailbox:
    """The events of one request, for one reader.

    Args:
        events: Bounded to what the request can ever produce, so that the engine never waits for the reader.
        on_close: Called once, with the reason to abort the request, or None if it has ended by itself.
    """

    def __init__(
        self, events: trio.MemoryReceiveChannel[Event], on_close: Callable[[FinishReason | None], None]
    ) -> None:
        self._events = events
        self._on_close: Callable[[FinishReason | None], None] | None = on_close

    async def receive(self) -> list[Event]:
        """Wait for an event and return it with all that have queued behind it."""
        try:
            events = [await self._events.receive()]
        except trio.EndOfChannel:
            raise EngineDeadError from None
        try:
            while True:
                events.append(self._events.receive_nowait())
        except (trio.WouldBlock, trio.EndOfChannel):
            return events

    def close(self, reason: FinishReason | None) -> None:
        """Stop reading. `reason` is why the rest is not wanted; ignored where there is no rest."""
        if self._on_close is None:
            return
        on_close, self._on_close = self._on_close, None
        ended = self._events.statistics().open_send_channels == 0
        self._events.close()
        on_close(None if ended else reason)
