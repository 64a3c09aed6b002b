"""One client connection: hypercorn's HTTP/1.1 between a socket and the app, hardened.

What differs from `hypercorn.trio`, each point with a test that fails without it:

- HTTP/1.1 only. h2c has no backpressure and its parser kills the server; WebSockets are not used here.
- A write that makes no progress for `write_timeout_s` ends the connection. Hypercorn's waits for ever, shielded.
- A write goes straight to the socket, without a cancel scope, while the kernel has room; chunks are framed here
  and not by h11. Together a third of the cost of a streamed event.
- A client that pipelined bytes and then leaves is noticed while its response is under way.
- After an error, what the client still sends is read for a moment, lest a reset overtakes the response.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
import sys
from collections.abc import Awaitable, Callable
from typing import Any, cast

import attrs
import h11
import trio
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.events import Body, Response
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.trio.worker_context import EventWrapper, WorkerContext
from hypercorn.typing import ConnectionState

from trio_llm.config import LimitsConfig
from trio_llm.server.errors import HttpError, error_body

logger = logging.getLogger(__name__)

_MAX_RECEIVE_BYTES = 64 * 1024
_MAX_PIPELINED_BYTES = 64 * 1024  # Beyond it a client that leaves is noticed only when something is written to it.
_LINGER_S = 2.0

ASGIApp = Callable[[Any, Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[None]]], Awaitable[None]]


class _ConnectionOverError(Exception):
    """The reader was waiting for a response to end, and the client left or the connection was closed."""


class _Pause(EventWrapper):
    """Where hypercorn's reader waits while the client has sent more than the request being answered."""

    def __init__(self, wait_for_leaving: Callable[[], Awaitable[None]], is_over: Callable[[], bool]) -> None:
        super().__init__()
        self._wait_for_leaving = wait_for_leaving
        self._is_over = is_over

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
    """Hypercorn's HTTP/1.1 without its ways out of it, and without h11 in the way of body chunks."""

    _chunked = False

    @property
    def h11(self) -> h11.Connection:
        """The parser; hypercorn's other kind of connection, a WebSocket's, never occurs here."""
        return cast(h11.Connection, self.connection)

    async def handle(self, event: Event) -> None:
        try:
            await super().handle(event)
        except h11.RemoteProtocolError as error:
            await self._send_error_response(error.error_status_hint)
            await self.send(Closed())

    async def stream_send(self, event: StreamEvent) -> None:
        if isinstance(event, Body) and self._chunked and self.h11.our_state is h11.SEND_BODY:
            await self.send(RawData(b"%x\r\n%b\r\n" % (len(event.data), event.data)))
            return
        await super().stream_send(event)
        if isinstance(event, Response):
            sized = any(name.lower() == b"content-length" for name, _ in event.headers)
            self._chunked = not sized and self.h11.their_http_version == b"1.1"

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

    Hypercorn's own keeps a queue open that nobody reads once the app has returned, and blocks on it for ever.
    """

    _nursery: trio.Nursery

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
        with from_client:
            try:
                await app(scope, from_client.receive, send)
            except* Exception as error:
                logger.error("a request failed outside its handler", exc_info=error)
        await send(None)


class Connection:
    """A socket, its protocol and the requests that run on it. `run` ends when the connection is closed."""

    def __init__(
        self,
        stream: trio.SocketStream,
        app: ASGIApp,
        config: Config,
        context: WorkerContext,
        limits: LimitsConfig,
    ) -> None:
        self._stream = stream
        self._app = app
        self._config = config
        self._context = context
        self._limits = limits
        self._protocol: _Http11
        self._reading = trio.CancelScope()
        self._writing = trio.Lock()
        self._idle = True
        self._head_begun = True  # A new connection waits for its first head no longer than for the rest of one.
        self._over = False

    async def run(self) -> None:
        _detect_dead_peers(self._stream.socket, self._limits.write_timeout_s)
        try:
            async with trio.open_nursery() as nursery:
                self._protocol = self._make_protocol(nursery)
                with self._reading:
                    self._reading.deadline = trio.current_time() + self._limits.header_timeout_s
                    await self._read()
                await self._protocol.handle(Closed())
        finally:
            await trio.aclose_forcefully(self._stream)

    def close_if_idle(self) -> None:
        """Close unless a request is under way."""
        if self._idle:
            self._reading.cancel()

    def abort(self) -> None:
        """Drop the connection now, with what the kernel still holds for the client."""
        self._over = True
        if self._stream.socket.fileno() != -1:
            self._stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._stream.socket.close()

    def _make_protocol(self, nursery: trio.Nursery) -> _Http11:
        sock = self._stream.socket
        protocol = _Http11(
            cast(Any, self._app),
            self._config,
            cast(Any, self._context),
            cast(Any, _AppTasks(nursery)),
            ConnectionState({}),
            False,
            sock.getpeername()[:2],
            sock.getsockname()[:2],
            self._send,
        )
        protocol.can_read = cast(Any, _Pause(self._wait_for_leaving, lambda: self._over))
        return protocol

    def _set_idle(self, idle: bool) -> None:
        self._idle = idle
        self._head_begun = False
        # One deadline on the reader, not a timer task per request as in hypercorn.
        self._reading.deadline = trio.current_time() + self._limits.keep_alive_timeout_s if idle else float("inf")

    # --- reading -------------------------------------------------------------------------------------------------

    async def _read(self) -> None:
        try:
            while data := await self._receive():
                if self._idle and not self._head_begun:
                    self._head_begun = True  # Time for the rest counts from here: dripping does not help.
                    self._reading.deadline = trio.current_time() + self._limits.header_timeout_s
                if not self._over:
                    await self._protocol.handle(RawData(data))
        except _ConnectionOverError:
            pass

    async def _receive(self) -> bytes:
        try:
            return bytes(await self._stream.receive_some(_MAX_RECEIVE_BYTES))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return b""

    async def _wait_for_leaving(self) -> None:
        """Keep reading on behalf of the paused protocol, which will find the bytes when it goes on."""
        pipelined_bytes = 0
        while pipelined_bytes < _MAX_PIPELINED_BYTES:
            data = await self._receive()
            if not data:
                return
            pipelined_bytes += len(data)
            self._protocol.h11.receive_data(data)
        await trio.sleep_forever()

    # --- writing -------------------------------------------------------------------------------------------------

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
            with trio.move_on_after(self._limits.write_timeout_s):
                async with self._writing:
                    await self._stream.send_all(data)
                complete = True
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            if not complete:  # Broken, too slow, or cancelled: a chunk was cut, nothing may follow it.
                self.abort()
        if not complete:
            await self._protocol.handle(Closed())

    async def _close(self) -> None:
        self._over = True
        if self._protocol.h11.their_state not in {h11.SEND_BODY, h11.ERROR}:
            await self._stream.aclose()
            return
        # The client is still sending. Closing now would send a reset, which discards the response it has not read.
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError):
            await self._stream.send_eof()
        self._reading.deadline = trio.current_time() + _LINGER_S


def _detect_dead_peers(sock: trio.socket.SocketType, timeout_s: float) -> None:
    if sys.platform == "linux" and sock.family in {socket.AF_INET, socket.AF_INET6}:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
        # Also the way out for plain hypercorn's endless write, see trio_llm.server.asgi.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(timeout_s * 1000))
