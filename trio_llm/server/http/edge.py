"""The ASGI edge in front of Quart: refuses invalid requests, and makes responses end as HTTP requires.

It works under our `serve` and under hypercorn's command line, and does not use Quart. It corrects two faults:

- hypercorn announces `http.disconnect` while it is still finishing a complete response, and quart-trio answers by
  cancelling the handler inside that clean-up: the connection is then neither reused nor closed.
- A response sent before the request body has arrived leaves the connection in the same state.
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
from trio_llm.server.bodies.size_limits import flag_of
from trio_llm.server.errors import HttpError, error_body
from trio_llm.server.http.connection import ASGIApp
from trio_llm.server.http.cors import Cors, Headers, origin_of
from trio_llm.server.http.proxies import TrustedProxies

logger = logging.getLogger(__name__)

LIFETIME = "trio_llm.lifetime"
_UPLOAD = "trio_llm.upload"
# The handlers of these read the body themselves: it may be too large for memory.
_UPLOAD_PATHS = frozenset({"/v1/files"})
_BODY_GRACE_S = 5.0
# Do not wait for the rest of a body that was too slow.
_TOO_LATE = frozenset({408, 504})


@attrs.frozen
class Lifetime:
    """The lifetime of one request. Its response may begin in one task and end in another.

    It is at `scope[LIFETIME]`. The edge's task closes `stack` when the request ends for any reason, so contexts in it
    must not contain a nursery or cancel scope; use `nursery` for tasks. Generation adds the request's tokens to
    `num_tokens`, for the rate limits.
    """

    nursery: trio.Nursery
    stack: contextlib.AsyncExitStack
    num_tokens: list[int] = attrs.field(factory=list[int])
    began_s: float = attrs.field(factory=trio.current_time)


def upload_chunks(scope: Any) -> AsyncIterator[bytes] | None:
    """Return the body of an upload, to be read as fast as it can be stored; None if Quart has read it.

    Raises, while it is read:
        HttpError: 408, the next part does not arrive in time.
    """
    exchange: _Exchange | None = scope.get(_UPLOAD)
    return exchange


@attrs.frozen(kw_only=True)
class Edge:
    """Wraps an ASGI app and caps the body bytes that the app sees."""

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
            with trio.move_on_after(_BODY_GRACE_S):  # Hypercorn waits until the body is read.
                while (await receive())["type"] != "http.disconnect":
                    pass
        elif self.cors is not None and (headers := self.cors.preflight(scope)) is not None:
            exchange = _Exchange(receive, send, self.limits, streams=True)  # An unused body is read too.
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
            # Quart answers errors of handlers; this is an error of Quart itself, or of a response that has begun.
            logger.error("a request failed outside its handler", exc_info=error)
            if not exchange.started:
                await _respond(send, HttpError(500, "The server failed on this request."), scope["path"])

    def _refusal(self, scope: Any) -> HttpError | None:
        """Return why the request's head is refused; None if it is valid."""
        names = Counter(name.lower() for name, _ in scope["headers"])
        head_bytes = len(scope["raw_path"]) + len(scope["query_string"])
        head_bytes += sum(len(name) + len(value) + 4 for name, value in scope["headers"])
        if names[b"content-length"] and names[b"transfer-encoding"]:
            # Request smuggling exploits servers that differ in which of the two they use (RFC 9112, 6.1).
            return HttpError(400, "Content-Length and Transfer-Encoding exclude each other.")
        if names.total() > (limit := self.limits.max_headers):
            return HttpError(431, f"At most {limit} headers ({flag_of('max_headers')}).")
        if head_bytes > (limit := self.limits.max_header_bytes):
            return HttpError(431, f"At most {limit} bytes of target and headers ({flag_of('max_header_bytes')}).")
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
    """Return whether a request target is a path, or a URL with one (as for proxies) that Quart can parse."""
    if target.startswith(("http://", "https://")):
        try:
            target = urlsplit(target).path
        except ValueError:
            return False
    return target.startswith("/")


class _Exchange:
    """`receive` and `send` of one request, corrected. Iterating over it yields the parts of an upload.

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
            # The handler reads the body itself; Quart gets an empty one.
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
            # Quart 0.23 checks the size of a chunked body at its end: pass just enough for it to refuse the body.
            message = message if self._body_bytes <= self._limits.max_body_bytes else {**message, "body": b""}
            self._body_bytes += len(message["body"])
        if self._finished and message["type"] == "http.disconnect":
            await trio.sleep_forever()  # The response is complete and the app ends itself.
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
            await trio.sleep_forever()  # The app gets the disconnect from `receive`, and cancels its handler.
        if not message.get("more_body", False):
            self._body_arrived.set()
        return message["body"]

    async def _when_body_arrived(self, start: Any) -> Any:
        """Delay a response until the request is read, or mark it to close the connection."""
        if start["status"] not in _TOO_LATE:
            with trio.move_on_after(_BODY_GRACE_S), suppress(HttpError):
                if self._streams:
                    async for _ in self:
                        pass  # Discard the body; its sender reads no response before it has sent everything.
                await self._body_arrived.wait()
        if self._body_arrived.is_set():
            return start
        return {**start, "headers": [*start["headers"], (b"connection", b"close")]}


def body_too_slow(limits: LimitsConfig) -> HttpError:
    """Return the error for a body that does not arrive; the rest of it is not parsed as a request."""
    seconds, flag = limits.body_timeout_s, flag_of("body_timeout_s")
    message = f"The request body did not arrive within {seconds:g} s ({flag})."
    return HttpError(408, message, headers={"Connection": "close"})


async def _respond(send: Any, error: HttpError, path: str) -> None:
    body = error_body(error, path)
    length = str(len(body)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", length), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
