"""Server-sent events: the deltas of a request's streams as they arrive, and a proper end in every case.

The response begins with the first token, so that every failure before it is an ordinary HTTP error, and the time of the
first event is the time of the first token. With keep-alives, a comment is sent if the first token takes longer than
their interval; failures after that are events. Deltas that queued since the last write go out in one write. A failure
after the first event is an error event, and then the stream ends as usual.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from typing import Any, ClassVar, Protocol, TypeAlias, cast

import msgspec
import trio
from msgspec import Struct

from trio_llm.engine import Delta
from trio_llm.server.errors import HttpError, error_object, to_http_error
from trio_llm.server.http.deadline import Deadline
from trio_llm.server.http.edge import Lifetime

logger = logging.getLogger(__name__)

HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx would otherwise collect the events
}
Deltas: TypeAlias = list[tuple[int, Delta]]
"""(stream index, delta), as they came."""

InThread: TypeAlias = Callable[[Callable[[], bytes]], Awaitable[bytes]]
"""Does work in a worker thread."""

DONE = b"data: [DONE]\n\n"
_KEEP_ALIVE = b": keep-alive\n\n"


class AnswerFormat(ABC):
    """The format of an endpoint's answers, whole and streamed.

    Attributes:
        events_have_names: Each event has its type as its name, and the type of the last event marks the end; otherwise
            events have no names and the last one is [DONE].
    """

    events_have_names: ClassVar[bool] = False

    @abstractmethod
    def answer(self, deltas: Sequence[Delta]) -> Struct:
        """Return the whole answer; `deltas` has one per stream."""

    @abstractmethod
    def chunks(self, index: int, delta: Delta) -> Sequence[Struct]:
        """Return the chunks for a delta of stream `index`."""

    def is_large(self, index: int) -> bool:  # noqa: ARG002 - others look at their stream
        """Return whether the next chunks of stream `index` take long to make."""
        return False

    def last_chunks(self) -> Sequence[Struct]:
        """Return the chunks after a successful end."""
        return ()

    def error_chunks(self, error: HttpError) -> Sequence[Struct]:
        """Return the chunks that end a failed stream."""
        return [error_object(error)]


class Source(Protocol):
    """A stream of deltas that is read without waiting; see `engine.Stream`."""

    @property
    def ended(self) -> bool: ...

    def take(self) -> Delta | None: ...

    def notify(self, reader: trio.lowlevel.ParkingLot, /) -> None: ...


class DeltaFeed:
    """The deltas of one request's streams.

    Its reader parks once per step, however many streams there are. A cancel scope around each wait costs more than
    everything else that is done for a token, so one task wakes the reader at the deadline and after silence.
    """

    def __init__(self, streams: Sequence[Source], lifetime: Lifetime, deadline: Deadline, keep_alive_s: float) -> None:
        self._deadline = deadline
        self._keep_alive_s = keep_alive_s or math.inf
        self._reader = trio.lowlevel.ParkingLot()
        self._waits_since_s = trio.current_time()
        self._silent = self._late = False
        self._error: Exception | None = None
        self._open = dict(enumerate(streams))
        for stream in streams:
            stream.notify(self._reader)
        if min(deadline.at_s, self._keep_alive_s) < math.inf:
            lifetime.nursery.start_soon(self._keep_time)

    async def next(self) -> Deltas | None:
        """Wait for new deltas and return all of them as (stream index, delta); empty at the end of all streams.

        None means that the keep-alive interval passed without a delta.

        Raises:
            HttpError: The request's deadline has passed.
            Exception: A stream raised it.
        """
        self._waits_since_s = trio.current_time()
        while not (deltas := self._take()) and self._open:
            await self._reader.park()
            if self._silent:
                self._silent = False
                return None
        return deltas

    def _take(self) -> Deltas:
        """Return what has come; raise a stream's exception, or the deadline's, after the deltas that came before it."""
        if self._error is not None:
            raise self._error
        deltas: Deltas = []
        for index, stream in tuple(self._open.items()):
            try:
                delta = stream.take()
            except Exception as error:
                if not deltas:
                    raise
                self._error = error
                break
            if delta is not None:
                deltas.append((index, delta))
            if stream.ended:
                del self._open[index]
        if self._late and self._open and self._error is None:
            self._error = self._deadline.error()
            if not deltas:
                raise self._error
        return deltas

    async def _keep_time(self) -> None:
        """Wake the reader at the deadline, and when it has waited for the keep-alive interval."""
        while (now_s := trio.current_time()) < self._deadline.at_s:
            due_s = self._waits_since_s + self._keep_alive_s
            if due_s <= now_s:
                due_s = now_s + self._keep_alive_s
                if self._reader:  # else it writes
                    self._silent = True
                    self._reader.unpark_all()
            await trio.sleep_until(min(due_s, self._deadline.at_s))
        self._late = True
        self._reader.unpark_all()


async def event_stream(
    feed: DeltaFeed, first: Deltas | None, form: AnswerFormat, in_thread: InThread
) -> AsyncIterator[bytes]:
    """Yield the body of a streamed answer; `first` is the feed's first result."""
    deltas = first
    spell = _named_event if form.events_have_names else _event

    def written(deltas: Deltas) -> bytes:
        return b"".join(spell(chunk) for index, delta in deltas for chunk in form.chunks(index, delta))

    try:
        while deltas or deltas is None:
            if deltas is None:
                yield _KEEP_ALIVE
            else:
                is_large = any(form.is_large(index) for index, _ in deltas)
                data = await in_thread(partial(written, deltas)) if is_large else written(deltas)
                if data:
                    yield data
            deltas = await feed.next()
        end = form.last_chunks()
    except Exception as error:  # The status is already sent, so the error must be an event.
        failure = to_http_error(error)
        logger.log(logging.ERROR if failure.status == 500 else logging.INFO, "a stream ended early", exc_info=error)
        end = form.error_chunks(failure)
    if data := b"".join(map(spell, end)) + (b"" if form.events_have_names else DONE):
        yield data


def _event(chunk: Struct) -> bytes:
    return b"data: %b\n\n" % msgspec.json.encode(chunk)


def _named_event(chunk: Struct) -> bytes:
    name: str = cast(Any, chunk).type
    return b"event: %b\n" % name.encode() + _event(chunk)
