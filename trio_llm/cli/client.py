"""A small HTTP/1.1 client on Trio for OpenAI-compatible APIs, for `chat` and `bench serve`.

A benchmark's client shares the machine with the server that it measures, so it has no connection pool, no retries and
no typed answers: one connection per request, bytes in, JSON objects out.
"""

from __future__ import annotations

import json
import ssl
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import SplitResult, urlsplit

import attrs
import h11
import trio

from trio_llm.errors import TrioLLMError

_CHUNK_BYTES = 65536
_MAX_ERROR_CHARS = 500
_CONNECT_TIMEOUT_S = 10.0


class ApiError(TrioLLMError):
    """The server refused a request, or did not answer as an HTTP server does."""


class Reply:
    """A response whose head has arrived."""

    def __init__(self, stream: trio.abc.Stream, connection: h11.Connection, head: h11.Response) -> None:
        self.status = head.status_code
        self._stream = stream
        self._connection = connection
        self._lines = deque[bytes]()
        self._rest = b""

    async def receive(self) -> bytes:
        """Return some of the body, b"" at its end."""
        event = await _next_event(self._stream, self._connection)
        return bytes(event.data) if isinstance(event, h11.Data) else b""

    async def read(self) -> bytes:
        """Return the whole body."""
        parts: list[bytes] = []
        while part := await self.receive():
            parts.append(part)
        return b"".join(parts)

    async def next_event(self) -> dict[str, Any] | None:
        """Return the next object of an event stream, None at [DONE].

        Raises:
            ApiError: It is an error, or the stream ends without [DONE].
        """
        while True:
            while self._lines:
                name, _, value = self._lines.popleft().strip().partition(b":")
                if name != b"data":
                    continue
                if value.strip() == b"[DONE]":
                    return None
                event = json.loads(value)
                if "error" in event:
                    raise ApiError(_error_message(event))
                return event
            if not (data := await self.receive()):
                raise ApiError("the stream broke off")
            *lines, self._rest = (self._rest + data).split(b"\n")
            self._lines += lines


@attrs.frozen
class Api:
    """An API at a base URL that ends in /v1; a URL without a path means that one."""

    base_url: str
    key: str | None = attrs.field(default=None, repr=False)

    @property
    def _url(self) -> SplitResult:
        parts = urlsplit(self.base_url.rstrip("/"))
        if parts.scheme not in {"http", "https"} or parts.hostname is None:
            raise ApiError(f"{self.base_url!r} is no base URL: expected something like http://localhost:8000/v1")
        return parts if parts.path else parts._replace(path="/v1")

    async def models(self) -> list[str]:
        """Return the ids of the models that are served."""
        return [model["id"] for model in json.loads(await self._whole("GET", "/models"))["data"]]

    async def metrics(self) -> str:
        """Return the /metrics page of the server. Raises ApiError if there is none."""
        return (await self._whole("GET", "/metrics", below_host=True)).decode()

    async def _whole(self, method: str, path: str, *, below_host: bool = False) -> bytes:
        async with self.open(method, path, below_host=below_host) as reply:
            return await reply.read()

    @asynccontextmanager
    async def open(
        self, method: str, path: str, body: object = None, *, below_host: bool = False
    ) -> AsyncGenerator[Reply, None]:
        """Send a request; leaving the block closes the connection, which ends the request on the server.

        Args:
            method: As HTTP spells it.
            path: Below the base URL, or with `below_host`, below its host.
            body: Sent as JSON, unless None.

        Raises:
            ApiError: The answer's status is not 200, or there is no answer.
        """
        url = self._url
        target = path if below_host else url.path + path
        payload = b"" if body is None else json.dumps(body).encode()
        headers = [("Host", url.netloc.rpartition("@")[2]), ("Connection", "close"), ("Accept", "*/*")]
        if self.key:
            headers.append(("Authorization", f"Bearer {self.key}"))
        if body is not None:
            headers += [("Content-Type", "application/json"), ("Content-Length", str(len(payload)))]
        connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=1 << 20)
        head = connection.send(h11.Request(method=method, target=target, headers=headers))
        assert head is not None
        async with await _connect(url) as stream:
            await _send(stream, head + payload, connection, payload)
            event = await _next_event(stream, connection)
            while isinstance(event, h11.InformationalResponse):
                event = await _next_event(stream, connection)
            if not isinstance(event, h11.Response):
                raise ApiError(f"{self.base_url}: no answer to {method} {target}")
            reply = Reply(stream, connection, event)
            if reply.status != 200:
                raise ApiError(f"{method} {target}: {reply.status}: {_refusal(await reply.read())}")
            yield reply


async def _connect(url: SplitResult) -> trio.abc.Stream:
    assert url.hostname is not None
    port = url.port or (443 if url.scheme == "https" else 80)
    try:
        with trio.fail_after(_CONNECT_TIMEOUT_S):
            if url.scheme == "http":
                return await trio.open_tcp_stream(url.hostname, port)
            context = ssl.create_default_context()
            return await trio.open_ssl_over_tcp_stream(url.hostname, port, https_compatible=True, ssl_context=context)
    except (OSError, trio.TooSlowError) as error:
        raise ApiError(f"cannot connect to {url.hostname}:{port}: {error or 'no answer'}") from None


async def _send(stream: trio.abc.Stream, data: bytes, connection: h11.Connection, payload: bytes) -> None:
    if payload:
        connection.send(h11.Data(data=payload))
    connection.send(h11.EndOfMessage())
    try:
        await stream.send_all(data)
    except trio.BrokenResourceError:
        raise ApiError("the server closed the connection") from None


async def _next_event(stream: trio.abc.Stream, connection: h11.Connection) -> Any:
    try:
        while (event := connection.next_event()) is h11.NEED_DATA:
            connection.receive_data(bytes(await stream.receive_some(_CHUNK_BYTES)))
    except trio.BrokenResourceError:
        raise ApiError("the server closed the connection") from None
    except h11.RemoteProtocolError as error:
        raise ApiError(f"the server does not answer as an HTTP server does: {error}") from None
    return event


def _refusal(body: bytes) -> str:
    try:
        return _error_message(json.loads(body))
    except (ValueError, TypeError):
        return body[:_MAX_ERROR_CHARS].decode(errors="replace")


def _error_message(body: dict[str, Any]) -> str:
    """Return the message of an error object; some servers send a bare string."""
    error = body.get("error", body)
    return str(error.get("message", error) if isinstance(error, dict) else error)[:_MAX_ERROR_CHARS]
