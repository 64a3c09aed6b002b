"""Server-sent events: the deltas of a request's streams as they come, and an orderly end whatever happens.

Nothing is sent before the first token exists, so that whatever is refused or fails until then is an ordinary HTTP
error, and clients that time the first event time the first token. Only where keep-alives are asked for, a comment goes
out once the first token has taken longer than their interval; what fails after that is an event. What has queued since
the last write goes out in one write. An error after the first event is one of its own, and the stream then ends as a
good one does.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Protocol, TypeAlias

import msgspec
import trio

from trio_llm.engine import Delta
from trio_llm.server.deadline import Deadline
from trio_llm.server.edge import Lifetime
from trio_llm.server.errors import HttpError, error_object, to_http_error

logger = logging.getLogger(__name__)

HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx would otherwise collect the events
}
Deltas: TypeAlias = list[tuple[int, Delta]]
"""(stream index, delta), as they came."""

_DONE = b"data: [DONE]\n\n"
_KEEP_ALIVE = b": keep-alive\n\n"


class ChunkFormat(Protocol):
    """How an endpoint spells its chunks."""

    def chunks(self, index: int, delta: Delta) -> Sequence[dict[str, Any]]:
        """Return the chunks for what stream `index` produced."""
        ...

    def last_chunks(self) -> Sequence[dict[str, Any]]:
        """Return what follows a good end: the usage, if it was asked for."""
        ...


class DeltaFeed:
    """The deltas of one request's streams, merged in the order in which they come."""

    def __init__(
        self, streams: Sequence[AsyncIterator[Delta]], lifetime: Lifetime, deadline: Deadline, keep_alive_s: float
    ) -> None:
        self._deadline = deadline
        self._keep_alive_s = keep_alive_s or math.inf
        self._only = streams[0] if len(streams) == 1 else None
        self._error: Exception | None = None
        if self._only is None:
            send, self._receive = trio.open_memory_channel[tuple[int, Delta | Exception]](len(streams))
            with send:
                for index, stream in enumerate(streams):
                    lifetime.nursery.start_soon(_pump, index, stream, send.clone())

    async def next(self) -> Deltas | None:
        """Wait for something new and return all of it as (stream index, delta); nothing at the end of all streams.

        None says that there was nothing for so long that the client should be told that its stream lives.

        Raises:
            HttpError: The request's deadline has come.
            Exception: What reading one of the streams raised.
        """
        with trio.move_on_after(self._keep_alive_s), self._deadline.kept():
            return await self._next()
        return None

    async def _next(self) -> Deltas:
        if self._only is not None:
            return [(0, delta)] if (delta := await anext(self._only, None)) is not None else []
        if self._error is not None:
            raise self._error
        return self._good(await self._receive_all())

    async def _receive_all(self) -> list[tuple[int, Delta | Exception]]:
        items: list[tuple[int, Delta | Exception]] = []
        try:
            items.append(await self._receive.receive())
            while True:
                items.append(self._receive.receive_nowait())
        except (trio.EndOfChannel, trio.WouldBlock):
            return items

    def _good(self, items: Sequence[tuple[int, Delta | Exception]]) -> Deltas:
        good: Deltas = []
        for index, item in items:
            if isinstance(item, Exception):
                self._error = item
                if not good:
                    raise item
                return good
            good.append((index, item))
        return good


async def _pump(
    index: int, stream: AsyncIterator[Delta], send: trio.MemorySendChannel[tuple[int, Delta | Exception]]
) -> None:
    with send:
        try:
            async for delta in stream:
                await send.send((index, delta))
        except Exception as error:  # noqa: BLE001 - raised where the deltas are read
            await send.send((index, error))


class TypedFormat(ChunkFormat, Protocol):
    """How an endpoint spells a stream whose events have types, and whose last event says by its type that it is."""

    def error_chunks(self, error: HttpError) -> Sequence[dict[str, Any]]:
        """Return what ends a stream that fails."""
        ...


def event_stream(feed: DeltaFeed, first: Deltas | None, form: ChunkFormat) -> AsyncIterator[bytes]:
    """Yield the body of a streamed answer, beginning with `first`, what the feed gave first."""
    return _written(feed, first, form, lambda error: [error_object(error)], _event, _DONE)


def typed_event_stream(feed: DeltaFeed, first: Deltas | None, form: TypedFormat) -> AsyncIterator[bytes]:
    """Yield the same where every event bears its type's name and none says [DONE]."""
    return _written(feed, first, form, form.error_chunks, _typed_event, b"")


async def _written(
    feed: DeltaFeed,
    first: Deltas | None,
    form: ChunkFormat,
    error_chunks: Callable[[HttpError], Sequence[dict[str, Any]]],
    spell: Callable[[dict[str, Any]], bytes],
    done: bytes,
) -> AsyncIterator[bytes]:
    deltas = first
    try:
        while deltas or deltas is None:
            if deltas is None:
                yield _KEEP_ALIVE
            elif data := b"".join(spell(chunk) for index, delta in deltas for chunk in form.chunks(index, delta)):
                yield data
            deltas = await feed.next()
        end = form.last_chunks()
    except Exception as error:  # The status is sent: this is the only way left to tell the client.
        told = to_http_error(error)
        logger.log(logging.ERROR if told.status == 500 else logging.INFO, "a stream ended early", exc_info=error)
        end = error_chunks(told)
    if data := b"".join(map(spell, end)) + done:
        yield data


def _event(chunk: dict[str, Any]) -> bytes:
    return b"data: %b\n\n" % msgspec.json.encode(chunk)


def _typed_event(chunk: dict[str, Any]) -> bytes:
    return b"event: %b\n" % chunk["type"].encode() + _event(chunk)
