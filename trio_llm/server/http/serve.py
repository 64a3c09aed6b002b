"""serve(): accept connections, isolate them from each other, and shut down in bounded time.

In `hypercorn.trio.serve` one connection's exception takes the whole server down, and one client that does not
read keeps it from ever stopping. Plain HTTP/1.1 in one process; TLS and HTTP/2 belong in a proxy in front.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, cast

import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.trio.lifespan import Lifespan
from hypercorn.trio.worker_context import WorkerContext

from trio_llm.config import LimitsConfig
from trio_llm.errors import TrioLLMError
from trio_llm.server.bodies.size_limits import flag_of
from trio_llm.server.errors import HttpError, error_body
from trio_llm.server.http.accept import AnswerProbe, accept_connections, contained
from trio_llm.server.http.connection import ASGIApp, Connection
from trio_llm.server.http.peers import is_loopback, limited_name
from trio_llm.server.http.proxies import TrustedProxies
from trio_llm.server.http.starts import Starts

logger = logging.getLogger(__name__)

_BACKLOG = 1024
_LAST_CALL_S = 1.0
_REFUSAL_S = 1.0


async def serve(
    app: ASGIApp,
    *,
    host: str,
    port: int,
    shutdown_trigger: Callable[[], Awaitable[object]],
    graceful_timeout_s: float = 30.0,
    last_call: Callable[[], None] = lambda: None,
    answer_probe: AnswerProbe = lambda _head, _peer: None,
    limits: LimitsConfig | None = None,
    trusted_proxies: Sequence[str] = (),
    task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve `app` until `shutdown_trigger` returns and the requests in progress have ended.

    Args:
        app: An ASGI application; its lifespan runs around the serving.
        host: Address to listen on.
        port: Port to listen on, 0 for a free one.
        shutdown_trigger: Awaited; when it returns, nothing new is accepted.
        graceful_timeout_s: Seconds that requests in progress get after that.
        last_call: Called at the end of that time, a second before the connections are dropped, so that open streams can
            send a last event.
        answer_probe: Answers a probe between other requests of a connection; synchronous and fast.
        limits: The number of connections, and limits of each.
        trusted_proxies: Addresses and networks that are exempt from the limit per address.
        task_status: Started with the URLs that it listens on.

    Raises:
        OSError: The address cannot be listened on.
        LifespanEndedError: The app's lifespan, with all its background tasks, ended before the shutdown.
    """
    limits = limits or LimitsConfig()
    config = _hypercorn_config(limits)
    listeners = await trio.open_tcp_listeners(port, host=host, backlog=_BACKLOG)
    lifespan = Lifespan(ASGIWrapper(cast(Any, app)), config, {})
    answer_probe = contained(answer_probe)
    server = _Server(app, config, limits, TrustedProxies.parse(trusted_proxies), answer_probe)
    async with trio.open_nursery() as lifespan_nursery:
        await lifespan_nursery.start(lifespan.handle_lifespan)
        await lifespan.wait_for_startup()
        # An app without lifespan support is served without. Another could not start; its exception propagates.
        if lifespan.supported and lifespan.shutdown.is_set():
            for listener in listeners:
                listener.socket.close()
            await trio.sleep_forever()
        async with trio.open_nursery() as nursery:
            async with trio.open_nursery() as accepting:
                for listener in listeners:
                    accepting.start_soon(accept_connections, listener, server.handle, nursery, answer_probe)
                if lifespan.supported:
                    accepting.start_soon(_fail_at_end, lifespan)
                task_status.started([_url(listener) for listener in listeners])
                await shutdown_trigger()
                accepting.cancel_scope.cancel()
            await server.stop(graceful_timeout_s, last_call)
            nursery.cancel_scope.cancel()
        await lifespan.wait_for_shutdown()
        lifespan_nursery.cancel_scope.cancel()


class LifespanEndedError(TrioLLMError):
    """The app's lifespan ended; the log has the reason."""

    def __str__(self) -> str:
        return "The app's lifespan ended while it was serving; the log has the reason."


async def _fail_at_end(lifespan: Lifespan) -> None:
    """Raise when the lifespan ends: hypercorn logs the reason and would continue without the background tasks."""
    await lifespan.shutdown.wait()
    raise LifespanEndedError


class _Server:
    """The open connections."""

    def __init__(
        self, app: ASGIApp, config: Config, limits: LimitsConfig, proxies: TrustedProxies, answer_probe: AnswerProbe
    ) -> None:
        self._app = app
        self._config = config
        self._by_peer = Counter[str]()
        self._limits = limits
        self._proxies = proxies
        self._context = WorkerContext(None)
        self._connections: set[Connection] = set()
        self._one_closed = trio.lowlevel.ParkingLot()
        self._starts = Starts(answer_probe)

    async def handle(self, stream: trio.SocketStream) -> None:
        """Serve one connection; log its errors and do not propagate them."""
        peer = self._counted_peer(stream)
        limit, limit_of_peer = self._limits.max_connections, self._limits.max_connections_per_peer
        if len(self._connections) >= limit:
            await _refuse(stream, f"Too many connections: at most {limit} ({flag_of('max_connections')}).")
            return
        if peer is not None and 0 < limit_of_peer <= self._by_peer[peer]:
            flag = flag_of("max_connections_per_peer")
            await _refuse(stream, f"Too many connections from your address: at most {limit_of_peer} ({flag}).")
            return
        if peer is not None:
            self._by_peer[peer] += 1
        connection = Connection(stream, self._app, self._config, self._context, self._limits, self._starts)
        self._connections.add(connection)
        try:
            await connection.run()
        except* OSError:  # The client disconnected before its address was read.
            pass
        except* Exception as error:
            logger.error("a connection failed; the others go on", exc_info=error)
        finally:
            self._connections.discard(connection)
            if peer is not None:
                self._by_peer[peer] -= 1
                if not self._by_peer[peer]:
                    del self._by_peer[peer]
            self._one_closed.unpark_all()

    def _counted_peer(self, stream: trio.SocketStream) -> str | None:
        """Return the connection's name for the limit; None for loopback, trusted proxies and closed connections."""
        try:
            address = stream.socket.getpeername()[0]
        except OSError:
            return None
        return None if is_loopback(address) or address in self._proxies else limited_name(address)

    async def stop(self, graceful_timeout_s: float, last_call: Callable[[], None]) -> None:
        """Let requests in progress end, in bounded time."""
        await self._context.terminated.set()  # Each connection closes after its response.
        for connection in self._connections:
            connection.close_if_idle()
        with trio.move_on_after(graceful_timeout_s):
            await self._wait_until_closed()
        last_call()
        with trio.move_on_after(_LAST_CALL_S):
            await self._wait_until_closed()

    async def _wait_until_closed(self) -> None:
        while self._connections:
            await self._one_closed.park()


async def _refuse(stream: trio.SocketStream, message: str) -> None:
    body = error_body(HttpError(503, message))
    head = (
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    with trio.move_on_after(_REFUSAL_S):
        try:
            await stream.send_all(head.encode() + body)
            await stream.send_eof()
            while await stream.receive_some():  # With an unread request, closing would send a reset.
                pass
        except trio.BrokenResourceError:
            pass
    await trio.aclose_forcefully(stream)


def _hypercorn_config(limits: LimitsConfig) -> Config:
    config = Config()
    config.h11_max_incomplete_size = limits.max_header_bytes
    config.include_server_header = False
    config.errorlog = logger
    return config


def _url(listener: trio.SocketListener) -> str:
    host, port = listener.socket.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
