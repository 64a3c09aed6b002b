"""An ASGI app that runs on Trio, in a thread of its own, called from asyncio: messages cross, nothing else does."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any

import trio

from trio_llm.bridge import Bridge
from trio_llm.server.http.connection import ASGIApp

Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]

_DISCONNECT = {"type": "http.disconnect"}


async def answer_on_trio(bridge: Bridge[Any], app: ASGIApp, scope: Any, receive: Receive, send: Send) -> None:
    """Answer one request with an app of the bridge's thread.

    Each message is passed on at once. A client that disconnects, or a cancelled task, cancels the app's task. A slow
    reader does not slow the app down: what it has not read is kept.

    Raises:
        EngineDeadError: The bridge has ended.
    """
    loop = asyncio.get_running_loop()
    outgoing: asyncio.Queue[Any] = asyncio.Queue()

    def put(message: Any) -> None:
        with suppress(RuntimeError):  # The loop has closed: the process ends.
            loop.call_soon_threadsafe(outgoing.put_nowait, message)

    request = _Request(put)
    call = bridge.start(request.run, app, scope)
    call.add_done_callback(lambda _: put(None))
    receiving = asyncio.create_task(_receive_all(receive, partial(bridge.post, request.deliver)))
    try:
        while (message := await outgoing.get()) is not None:
            await send(message)
    finally:
        receiving.cancel()
        bridge.abandon(call)
    call.result()


async def _receive_all(receive: Receive, deliver: Callable[[Any], None]) -> None:
    """Pass on what the client sends, up to its disconnect."""
    message = None
    while message is None or message["type"] != "http.disconnect":
        try:
            message = await receive()
        except Exception:  # noqa: BLE001 - the proxy that held the connection is gone
            message = _DISCONNECT
        deliver(message)


class _Request:
    """One request in the bridge's thread.

    Args:
        put: Takes a message for the client; None ends the response.
    """

    def __init__(self, put: Callable[[Any], None]) -> None:
        self._put = put
        self._messages: deque[Any] = deque()
        self._arrived = trio.lowlevel.ParkingLot()

    def deliver(self, message: Any) -> None:
        self._messages.append(message)
        self._arrived.unpark_all()

    async def run(self, app: ASGIApp, scope: Any) -> None:
        await app(scope, self._receive, self._send)

    async def _receive(self) -> Any:
        await trio.lowlevel.checkpoint()
        while not self._messages:
            await self._arrived.park()
        return self._messages.popleft()

    async def _send(self, message: Any) -> None:
        self._put(message)
        await trio.lowlevel.checkpoint()
