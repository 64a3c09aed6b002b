"""One client connection: hypercorn's HTTP/1.1 between a socket and the app, hardened.

Differences from `hypercorn.trio`, each with a test that fails without it:

- HTTP/1.1 only. h2c has no backpressure and its parser kills the server; WebSockets are not used here.
- A client that reads nothing for `write_timeout_s` is dropped; a slow one is not. Hypercorn waits forever, shielded.
- A write goes straight to the socket, without a cancel scope, while the kernel has room; chunks are framed here and not
  by h11. Together this saves a third of the cost of a streamed event.
- A client that pipelined bytes and then disconnects is noticed during its response.
- After an error, the rest of the request is read for a moment, so that a reset does not discard the response.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Any, cast

import attrs
import h11
import trio
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.events import Response
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.trio.worker_context import EventWrapper, WorkerContext
from hypercorn.typing import ConnectionState
from hypercorn.utils import suppress_body

from trio_llm.config import LimitsConfig
from trio_llm.server.errors import HttpError, error_body
from trio_llm.server.http.starts import Starts
from trio_llm.server.http.tcp import detect_dead_peers, queued_bytes

logger = logging.getLogger(__name__)

_MAX_RECEIVE_BYTES = 64 * 1024
_MAX_PIPELINED_BYTES = 64 * 1024  # Beyond this, a disconnect is noticed only at the next write.
_LINGER_S = 2.0

ASGIApp = Callable[[Any, Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[None]]], Awaitable[None]]


class _ConnectionOverError(Exception):
    """The client disconnected or the connection was closed while the reader waited for a response to end."""


class _Pause(EventWrapper):
    """Hypercorn's reader waits here while the client has pipelined more than the current request."""

    def __init__(self, wait_for_leaving: Callable[[], Awaitable[None]], is_over: Callable[[], bool]) -> None:
        super().__init__()
        self._wait_for_leaving = wait_for_leaving
        self._is_over = is_over

    def end(self) -> None:
        """End the wait: hypercorn sets the event after a response, and none follows on a connection that is over."""
        self._event.set()

    async def wait(self) -> None:
        left = False

        async def watch() -> None:
            nonlocal left
            await self._wait_for_leaving()
            left = True
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            await super().wait()
            nursery.cancel_scope.cancel()
        if left or self._is_over():
            raise _ConnectionOverError


class _Http11(H11Protocol):
    """Hypercorn's HTTP/1.1 without upgrades to other protocols, and with body chunks that bypass h11."""

    _chunked = False  # the response's body goes out in chunks

    @property
    def h11(self) -> h11.Connection:
        """The parser; hypercorn's WebSocket connection never occurs here."""
        return cast(h11.Connection, self.connection)

    async def handle(self, event: Event) -> None:
        try:
            await super().handle(event)
        except h11.RemoteProtocolError as error:
            await self._send_error_response(error.error_status_hint)
            await self.send(Closed())

    async def stream_send(self, event: StreamEvent) -> None:
        await super().stream_send(event)
        if isinstance(event, Response):
            sized = any(name.lower() == b"content-length" for name, _ in event.headers)
            # The stream is gone if the client is.
            bodiless = self.stream is None or suppress_body(cast(Any, self.stream.scope)["method"], event.status_code)
            self._chunked = not (sized or bodiless) and self.h11.their_http_version == b"1.1"

    @property
    def sends_chunks(self) -> bool:
        return self._chunked and self.h11.our_state is h11.SEND_BODY

    async def _check_protocol(self, event: h11.Request) -> None:
        if event.http_version not in {b"1.0", b"1.1"}:
            raise h11.RemoteProtocolError("only HTTP/1.0 and 1.1 are spoken here", error_status_hint=505)

    async def _create_stream(self, request: h11.Request) -> None:
        # A server may ignore Upgrade (RFC 9110, 7.8); without the header hypercorn makes no WebSocket of it.
        headers = [(name, value) for name, value in request.headers if name != b"upgrade"]
        if len(headers) < len(request.headers):
            version = request.http_version
            request = h11.Request(method=request.method, target=request.target, http_version=version, headers=headers)
        await super()._create_stream(request)

    async def _send_error_response(self, status_code: int) -> None:
        body = error_body(HttpError(status_code, "The request is not valid HTTP/1.1."))
        length = str(len(body)).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", length), (b"connection", b"close")]
        await self._send_h11_event(h11.Response(status_code=status_code, headers=headers))
        await self._send_h11_event(h11.Data(data=body))
        await self._send_h11_event(h11.EndOfMessage())


@attrs.frozen
class _AppTasks:
    """Starts the app for each request of a connection (hypercorn's TaskGroup).

    Hypercorn's own task group keeps a queue open after the app has returned, and blocks on it forever.
    """

    _nursery: trio.Nursery
    _connection: Connection

    async def spawn_app(
        self, app: ASGIApp, config: Config, scope: Any, send: Callable[[Any], Awaitable[None]]
    ) -> Callable[[Any], Awaitable[None]]:
        to_app, from_client = trio.open_memory_channel[Any](config.max_app_queue_size)

        async def put(message: Any) -> None:
            with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                if message["type"] == "http.disconnect":  # Must not wait behind a body that nobody reads any more.
                    with contextlib.suppress(trio.WouldBlock):
                        while True:
                            from_client.receive_nowait()
                    to_app.send_nowait(message)
                else:
                    await to_app.send(message)

        self._nursery.start_soon(self._run, app, scope, from_client, send)
        return put

    async def _run(
        self,
        app: ASGIApp,
        scope: Any,
        from_client: trio.MemoryReceiveChannel[Any],
        send: Callable[[Any], Awaitable[None]],
    ) -> None:
        async def send_directly(message: Any) -> None:
            # A part of a stream, of which there are thousands a second, takes none of hypercorn's steps.
            if message.get("more_body") and (body := message.get("body")) and self._connection.sends_chunks:
                await self._connection.send_chunk(body)
            else:
                await send(message)

        with from_client:
            try:
                await app(scope, from_client.receive, send_directly)
            except* Exception as error:
                logger.error("a request failed outside its handler", exc_info=error)
        await send(None)


class Connection:
    """A socket, its protocol and its requests. `run` ends when the connection is closed."""

    def __init__(
        self,
        stream: trio.SocketStream,
        app: ASGIApp,
        config: Config,
        context: WorkerContext,
        limits: LimitsConfig,
        starts: Starts | None = None,
    ) -> None:
        self._starts = starts or Starts()
        self._stream = stream
        self._app = app
        self._config = config
        self._context = context
        self._limits = limits
        self._protocol: _Http11
        self._pause = _Pause(self._wait_for_leaving, lambda: self._over)
        self._receiving = trio.CancelScope()  # of the last wait for bytes; the next one takes over its deadline
        self._writing = trio.Lock()
        self._idle = True
        self._head_begun = True  # A new connection waits for its first head no longer than for the rest of one.
        self._over = False

    async def run(self) -> None:
        detect_dead_peers(self._stream.socket, self._limits.write_timeout_s)
        try:
            async with trio.open_nursery() as nursery:
                self._protocol = self._make_protocol(nursery)
                self._receiving.deadline = trio.current_time() + self._limits.header_timeout_s
                await self._read()
                await self._protocol.handle(Closed())
        finally:
            await trio.aclose_forcefully(self._stream)

    def close_if_idle(self) -> None:
        """Close unless a request is under way. A client that does not read the answer to a probe is not waited for."""
        if self._idle:
            self._receiving.cancel()
            if self._writing.locked():
                self.abort()

    def abort(self) -> None:
        """Drop the connection now, with what the kernel still holds for the client."""
        self._over = True
        self._pause.end()
        if self._stream.socket.fileno() != -1:
            self._stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._stream.socket.close()

    def _make_protocol(self, nursery: trio.Nursery) -> _Http11:
        sock = self._stream.socket
        protocol = _Http11(
            cast(Any, self._app),
            self._config,
            cast(Any, self._context),
            cast(Any, _AppTasks(nursery, self)),
            ConnectionState({}),
            False,
            sock.getpeername()[:2],
            sock.getsockname()[:2],
            self._send,
        )
        protocol.can_read = cast(Any, self._pause)
        return protocol

    def _set_idle(self, idle: bool) -> None:
        self._idle = idle
        self._head_begun = False
        # One deadline on the reader, not a timer task per request as in hypercorn.
        self._receiving.deadline = trio.current_time() + self._limits.keep_alive_timeout_s if idle else float("inf")

    # --- reading -------------------------------------------------------------------------------------------------

    async def _read(self) -> None:
        try:
            while data := await self._receive_in_time():
                if self._idle and not self._over and await self._is_answered(data):
                    continue
                if self._idle:
                    await self._wait_for_turn(data)
                if self._idle and not self._head_begun:
                    self._head_begun = True  # Time for the rest counts from here: dripping does not help.
                    self._receiving.deadline = trio.current_time() + self._limits.header_timeout_s
                if not self._over:
                    await self._protocol.handle(RawData(data))
        except _ConnectionOverError:
            pass

    async def _is_answered(self, data: bytes) -> bool:
        """Answer a probe at once, if it is all that came; the protocol does not see it."""
        if self._protocol.h11.trailing_data[0]:
            return False
        try:
            peer = self._stream.socket.getpeername()[0]
        except OSError:  # The client has disconnected, which the next read tells.
            return False
        answer = self._starts.answer_probe(data, peer)
        if answer is None or answer.closes or answer.request_bytes != len(data):
            return False
        self._set_idle(True)
        await self._write(answer.data)
        return True

    async def _wait_for_turn(self, head: bytes) -> None:
        """Wait until the request may begin. The client's time for its headers does not run meanwhile."""
        left_s = self._receiving.deadline - trio.current_time()
        await self._starts.turn(head)
        self._receiving.deadline = trio.current_time() + left_s

    async def _receive_in_time(self) -> bytes:
        """Return what came; nothing if the client left or its time is over, or once the server stops.

        The scope is round the wait alone. After the event loop stood still, bytes and the end of the time may come in
        one pass: then `_receive` returns the bytes, and a scope round what serves them would cancel that.
        """
        if self._idle and self._context.terminated.is_set():
            return self._receive_nowait()
        with trio.CancelScope(deadline=self._receiving.deadline) as self._receiving:
            return await self._receive()
        return b""

    def _receive_nowait(self) -> bytes:
        try:
            return os.read(self._stream.socket.fileno(), _MAX_RECEIVE_BYTES)
        except OSError:  # Nothing has come, or the client has disconnected.
            return b""

    async def _receive(self) -> bytes:
        try:
            return bytes(await self._stream.receive_some(_MAX_RECEIVE_BYTES))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return b""

    async def _wait_for_leaving(self) -> None:
        """Keep reading for the paused protocol, which gets the bytes when it resumes."""
        pipelined_bytes = 0
        while pipelined_bytes < _MAX_PIPELINED_BYTES:
            data = await self._receive()
            if not data:
                return
            pipelined_bytes += len(data)
            self._protocol.h11.receive_data(data)
        await trio.sleep_forever()

    # --- writing -------------------------------------------------------------------------------------------------

    @property
    def sends_chunks(self) -> bool:
        """Whether a part of the response's body is now to be sent by `send_chunk`."""
        return self._protocol.sends_chunks

    async def send_chunk(self, data: bytes) -> None:
        """Send a part of the response's body, not empty."""
        await self._write(b"%x\r\n%b\r\n" % (len(data), data))

    async def _send(self, event: Event) -> None:
        if isinstance(event, RawData):
            await self._write(event.data)
        elif isinstance(event, Updated):
            self._set_idle(event.idle)
        elif isinstance(event, Closed):
            await self._close()

    async def _write(self, data: bytes) -> None:
        """Write `data`; has a checkpoint only where it must wait for the client."""
        sent = 0
        if not self._writing.locked():
            try:
                sent = os.write(self._stream.socket.fileno(), data)
            except BlockingIOError:
                pass
            except OSError:
                self.abort()
                await self._protocol.handle(Closed())
                return
        if sent < len(data):
            await self._write_when_possible(memoryview(data)[sent:])

    async def _write_when_possible(self, data: memoryview) -> None:
        complete = False
        try:
            async with self._writing:
                complete = await self._send_steadily(data)
        except (OSError, trio.ClosedResourceError):
            pass
        finally:
            if not complete:  # Broken, too slow, or cancelled: a chunk was cut, nothing may follow it.
                self.abort()
        if not complete:
            await self._protocol.handle(Closed())

    async def _send_steadily(self, data: memoryview) -> bool:
        """Send all of `data` however slowly the client reads; False if it reads nothing for `write_timeout_s`."""
        sock = self._stream.socket
        held_bytes = queued_bytes(sock)
        while data:
            with trio.move_on_after(self._limits.write_timeout_s) as waiting:
                data = data[await sock.send(data) :]
            # The kernel reports room only once a third of its buffer is free: megabytes, which a slow client takes
            # longer to read than the timeout.
            before_bytes, held_bytes = held_bytes, queued_bytes(sock)
            if waiting.cancelled_caught and held_bytes >= before_bytes:
                return False
        return True

    async def _close(self) -> None:
        self._over = True
        if self._protocol.h11.their_state not in {h11.SEND_BODY, h11.ERROR}:
            await self._stream.aclose()
            return
        # The client is still sending. Closing now would send a reset, which discards the response it has not read.
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError):
            await self._stream.send_eof()
        self._receiving.deadline = trio.current_time() + _LINGER_S
