"""The ASGI edge in front of Quart: refuses what no app should see, and makes responses end as HTTP expects.

It works the same under our `serve` and under the hypercorn command line, and uses nothing of Quart:

- hypercorn announces `http.disconnect` while it is still finishing a complete response, and quart-trio answers by
  cancelling the handler inside that clean-up: the connection is then neither reused nor closed.
- A response sent before the request body has arrived leaves the connection half-dead in the same way.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import attrs
import trio

from trio_llm.config import LimitsConfig
from trio_llm.server.amounts import flag_of
from trio_llm.server.connection import ASGIApp
from trio_llm.server.cors import Cors, Headers, origin_of
from trio_llm.server.errors import HttpError, error_body
from trio_llm.server.proxies import TrustedProxies

logger = logging.getLogger(__name__)

LIFETIME = "trio_llm.lifetime"
_UPLOAD = "trio_llm.upload"
# Bodies of these are not read ahead of the handler: they may be far larger than what anybody wants in memory.
_UPLOAD_PATHS = frozenset({"/v1/files"})
_BODY_GRACE_S = 5.0


@attrs.frozen
class Lifetime:
    """What lives exactly as long as one request: the response may begin in one task and end in another.

    Found under `scope[LIFETIME]`. What is entered in `stack` is left when the request is over, however it ended,
    in the task of the edge: it must not hold a nursery or cancel scope of its own; `nursery` is there for tasks.
    Who spends tokens for the request adds their number to `num_tokens`, for whoever limits them.
    """

    nursery: trio.Nursery
    stack: contextlib.AsyncExitStack
    num_tokens: list[int] = attrs.field(factory=list[int])
    began_s: float = attrs.field(factory=trio.current_time)


def upload_chunks(scope: Any) -> AsyncIterator[bytes] | None:
    """Return the body of an upload, to be read as fast as it can be stored; None where Quart has read it.

    Raises, while it is read:
        HttpError: 408, the next part does not come.
    """
    exchange: _Exchange | None = scope.get(_UPLOAD)
    return exchange


@attrs.frozen(kw_only=True)
class Edge:
    """Wraps an ASGI app; it is shown little more of a body than it may have, however much is sent."""

    app: ASGIApp
    limits: LimitsConfig
    proxies: TrustedProxies = attrs.field(factory=TrustedProxies)
    cors: Cors | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close"})
        elif self.cors is None:
            await self._answer(scope, receive, send)
        else:
            await self._answer(scope, receive, _marking(send, self.cors.marks(origin_of(scope))))

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        if (refusal := self._refusal(scope)) is not None:
            await _respond(send, refusal, scope["path"])
            with trio.move_on_after(_BODY_GRACE_S):  # Hypercorn waits for somebody to take the body off it.
                while (await receive())["type"] != "http.disconnect":
                    pass
        elif self.cors is not None and (headers := self.cors.preflight(scope)) is not None:
            exchange = _Exchange(receive, send, self.limits, streams=True)  # A body that nobody wants is read too.
            await exchange.send({"type": "http.response.start", "status": 204, "headers": headers})
            await exchange.send({"type": "http.response.body"})
        else:
            await self._run(scope, receive, send)

    async def _run(self, scope: Any, receive: Any, send: Any) -> None:
        streams = scope["method"] == "POST" and scope["path"] in _UPLOAD_PATHS
        exchange = _Exchange(receive, send, self.limits, streams=streams)
        if streams:
            scope[_UPLOAD] = exchange
        try:
            async with contextlib.AsyncExitStack() as stack, trio.open_nursery() as nursery:
                scope[LIFETIME] = Lifetime(nursery, stack)
                await self.app(scope, exchange.receive, exchange.send)
                nursery.cancel_scope.cancel()
        except* Exception as error:
            # Errors of handlers were answered inside Quart; this is Quart itself, or a response cut in the middle.
            logger.error("a request failed outside its handler", exc_info=error)
            if not exchange.started:
                await _respond(send, HttpError(500, "The server failed on this request."), scope["path"])

    def _refusal(self, scope: Any) -> HttpError | None:
        """Say why a request is refused by its head alone."""
        names = Counter(name.lower() for name, _ in scope["headers"])
        head_bytes = len(scope["raw_path"]) + len(scope["query_string"])
        head_bytes += sum(len(name) + len(value) + 4 for name, value in scope["headers"])
        if names[b"content-length"] and names[b"transfer-encoding"]:
            # Which of the two counts is what request smuggling is about (RFC 9112, 6.1).
            return HttpError(400, "Content-Length and Transfer-Encoding exclude each other.")
        if names.total() > (most := self.limits.max_headers):
            return HttpError(431, f"At most {most} headers ({flag_of('max_headers')}).")
        if head_bytes > (most := self.limits.max_header_bytes):
            return HttpError(431, f"At most {most} bytes of target and headers ({flag_of('max_header_bytes')}).")
        if not _has_path(scope["path"]):
            return HttpError(400, "The request target is not a path.")
        try:
            self.proxies.see_through(scope)
        except HttpError as error:
            return error
        return None


def _marking(send: Any, marks: Headers) -> Any:
    """Return a `send` that adds headers to the response."""

    async def marked(message: Any) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], *marks]}
        await send(message)

    return marked


def _has_path(target: str) -> bool:
    """Say whether a request target is a path, or a URL with one (as sent to proxies) that Quart can take apart."""
    if target.startswith(("http://", "https://")):
        try:
            target = urlsplit(target).path
        except ValueError:
            return False
    return target.startswith("/")


class _Exchange:
    """`receive` and `send` of one request, mended. Iterating over it takes the parts of an upload.

    Attributes:
        started: The response has begun.
    """

    def __init__(self, receive: Any, send: Any, limits: LimitsConfig, *, streams: bool) -> None:
        self._receive = receive
        self._send = send
        self._limits = limits
        self._body_bytes = 0
        self._body_arrived = trio.Event()
        self._streams = streams
        self._told_empty = False
        self._gone = False
        self._finished = False
        self.started = False

    async def receive(self) -> Any:
        if self._streams and not self._told_empty:
            # The handler reads the body itself; Quart is told that there is none.
            self._told_empty = True
            return {"type": "http.request", "body": b"", "more_body": False}
        if self._streams:
            await self._body_arrived.wait()
            if self._gone:
                return {"type": "http.disconnect"}
        message = await self._receive()
        if message["type"] != "http.request" or not message.get("more_body", False):
            self._body_arrived.set()
        if message["type"] == "http.request":
            # Quart 0.23 looks at the size of a chunked body when it has all of it: it gets enough to refuse it.
            message = message if self._body_bytes <= self._limits.max_body_bytes else {**message, "body": b""}
            self._body_bytes += len(message["body"])
        if self._finished and message["type"] == "http.disconnect":
            await trio.sleep_forever()  # The response is complete: the app ends by itself.
        return message

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            message = await self._when_body_arrived(message)
            self.started = True
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self._finished = True
        await self._send(message)

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if self._body_arrived.is_set():
            raise StopAsyncIteration
        message = None
        with trio.move_on_after(self._limits.body_timeout_s):
            message = await self._receive()
        if message is None:
            raise body_too_slow(self._limits)
        if message["type"] != "http.request":
            self._gone = True
            self._body_arrived.set()
            await trio.sleep_forever()  # The app learns of it by `receive`, and cancels its handler.
        if not message.get("more_body", False):
            self._body_arrived.set()
        return message["body"]

    async def _when_body_arrived(self, start: Any) -> Any:
        """Hold a response until the request was read, or say that the connection ends with it."""
        with trio.move_on_after(_BODY_GRACE_S), suppress(HttpError):
            if self._streams:
                async for _ in self:
                    pass  # What nobody wanted; its sender reads no answer before it is through.
            await self._body_arrived.wait()
        if self._body_arrived.is_set():
            return start
        return {**start, "headers": [*start["headers"], (b"connection", b"close")]}


def body_too_slow(limits: LimitsConfig) -> HttpError:
    """Return the refusal of a body that does not come; what still comes of it is no request."""
    seconds, flag = limits.body_timeout_s, flag_of("body_timeout_s")
    message = f"The request body did not arrive within {seconds:g} s ({flag})."
    return HttpError(408, message, headers={"Connection": "close"})


async def _respond(send: Any, error: HttpError, path: str) -> None:
    body = error_body(error, path)
    length = str(len(body)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", length), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
