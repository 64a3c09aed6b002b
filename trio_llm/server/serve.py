"""serve(): accept connections, keep them apart from each other, and shut down in bounded time.

In `hypercorn.trio.serve` one connection's exception takes the whole server down, and one client that does not
read keeps it from ever stopping. Plain HTTP/1.1 in one process; TLS and HTTP/2 belong in a proxy in front.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, cast

import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.trio.lifespan import Lifespan
from hypercorn.trio.worker_context import WorkerContext

from trio_llm.config import LimitsConfig
from trio_llm.server.amounts import flag_of
from trio_llm.server.auth import is_loopback, limited_name
from trio_llm.server.connection import ASGIApp, Connection
from trio_llm.server.errors import HttpError, error_body
from trio_llm.server.proxies import TrustedProxies

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
    limits: LimitsConfig | None = None,
    trusted_proxies: Sequence[str] = (),
    task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve `app` until `shutdown_trigger` returns and the requests under way have ended.

    Args:
        app: An ASGI application; its lifespan is run round the serving.
        host: Address to listen on.
        port: Port to listen on, 0 for a free one.
        shutdown_trigger: Awaited; when it returns, nothing new is accepted.
        graceful_timeout_s: How long requests under way may go on after that.
        last_call: Called when that time is up, a second before the connections are dropped, so that open
            streams can say goodbye.
        limits: How many connections there may be, and what each of them may do.
        trusted_proxies: Addresses and networks whose connections count only towards the sum: they are everybody's.
        task_status: Started with the URLs it listens on.

    Raises:
        OSError: The address cannot be listened on.
    """
    limits = limits or LimitsConfig()
    config = _hypercorn_config(limits)
    listeners = await trio.open_tcp_listeners(port, host=host, backlog=_BACKLOG)
    lifespan = Lifespan(ASGIWrapper(cast(Any, app)), config, {})
    server = _Server(app, config, limits, TrustedProxies.parse(trusted_proxies))
    async with trio.open_nursery() as lifespan_nursery:
        await lifespan_nursery.start(lifespan.handle_lifespan)
        await lifespan.wait_for_startup()
        # One that knows no lifespan is served without; another could not start, and its reason is on its way out.
        if lifespan.supported and lifespan.shutdown.is_set():
            for listener in listeners:
                listener.socket.close()
            await trio.sleep_forever()
        async with trio.open_nursery() as nursery:
            async with trio.open_nursery() as accepting:
                accepting.start_soon(partial(trio.serve_listeners, server.handle, listeners, handler_nursery=nursery))
                task_status.started([_url(listener) for listener in listeners])
                await shutdown_trigger()
                accepting.cancel_scope.cancel()
            await server.stop(graceful_timeout_s, last_call)
            nursery.cancel_scope.cancel()
        await lifespan.wait_for_shutdown()
        lifespan_nursery.cancel_scope.cancel()


class _Server:
    """The open connections."""

    def __init__(self, app: ASGIApp, config: Config, limits: LimitsConfig, proxies: TrustedProxies) -> None:
        self._app = app
        self._config = config
        self._by_peer = Counter[str]()
        self._limits = limits
        self._proxies = proxies
        self._context = WorkerContext(None)
        self._connections: set[Connection] = set()
        self._one_closed = trio.lowlevel.ParkingLot()

    async def handle(self, stream: trio.SocketStream) -> None:
        """Serve one connection; whatever goes wrong with it is logged and ends here."""
        peer = self._counted_peer(stream)
        most, most_of_peer = self._limits.max_connections, self._limits.max_connections_per_peer
        if len(self._connections) >= most:
            await _refuse(stream, f"Too many connections: at most {most} ({flag_of('max_connections')}).")
            return
        if peer is not None and 0 < most_of_peer <= self._by_peer[peer]:
            flag = flag_of("max_connections_per_peer")
            await _refuse(stream, f"Too many connections from your address: at most {most_of_peer} ({flag}).")
            return
        if peer is not None:
            self._by_peer[peer] += 1
        connection = Connection(stream, self._app, self._config, self._context, self._limits)
        self._connections.add(connection)
        try:
            await connection.run()
        except* OSError:  # The client was gone before its address could be asked for.
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
        """Return the name a connection is counted by; None for this machine, our proxies, and who has left already."""
        try:
            address = stream.socket.getpeername()[0]
        except OSError:
            return None
        return None if is_loopback(address) or address in self._proxies else limited_name(address)

    async def stop(self, graceful_timeout_s: float, last_call: Callable[[], None]) -> None:
        """Let requests under way end, in bounded time."""
        await self._context.terminated.set()  # From now on each connection closes after its response.
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
            while await stream.receive_some():  # A reset would overtake the answer while the request is unread.
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
