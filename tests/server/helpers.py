"""What the server's tests share: a server on a free port, a raw client, and a driver for one ASGI request."""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import attrs
import trio

from trio_llm.server.http.serve import serve


@attrs.define
class Running:
    """A server under test."""

    port: int
    stop: trio.Event
    stopped: trio.Event
    clients: AsyncExitStack

    async def connect(self, receive_buffer_bytes: int | None = None) -> trio.SocketStream:
        """Open a connection; a small receive buffer makes a client that stalls early."""
        sock = trio.socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        if receive_buffer_bytes is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        self.clients.callback(sock.close)
        await sock.connect(("127.0.0.1", self.port))
        return await self.clients.enter_async_context(trio.SocketStream(sock))


@asynccontextmanager
async def running(app: Any, **settings: Any) -> AsyncIterator[Running]:
    """Serve `app` with our serve() while the block runs; a failure of the server fails the test."""
    stop, stopped = trio.Event(), trio.Event()

    async def run(*, task_status: trio.TaskStatus[list[str]]) -> None:
        await serve(app, host="127.0.0.1", port=0, shutdown_trigger=stop.wait, task_status=task_status, **settings)
        stopped.set()

    async with trio.open_nursery() as nursery:
        async with AsyncExitStack() as clients:
            urls = await nursery.start(run)
            yield Running(int(urls[0].rsplit(":", 1)[1]), stop, stopped, clients)
        nursery.cancel_scope.cancel()


def http(method: str, path: str, body: bytes = b"", *headers: str, version: str = "1.1") -> bytes:
    """Spell a request."""
    lines = [f"{method} {path} HTTP/{version}", "Host: x", *headers]
    if body or method == "POST":
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


async def read_response(stream: trio.SocketStream) -> tuple[int, dict[str, str], bytes]:
    """Read one response with a Content-Length, or to the end of the connection: status, headers, body."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += (chunk := await stream.receive_some())
        if not chunk:
            raise EOFError(data)
    head, _, body = data.partition(b"\r\n\r\n")
    first, *rest = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in rest)}
    length = int(headers["content-length"]) if "content-length" in headers else None
    while length is None or len(body) < length:
        body += (chunk := await stream.receive_some())
        if not chunk:
            break
    return int(first.split()[1]), headers, body


async def read_to_end(stream: trio.SocketStream) -> bytes:
    """Read until the server closes; a reset counts as the end."""
    data = b""
    try:
        while chunk := await stream.receive_some():
            data += chunk
    except trio.BrokenResourceError:
        pass
    return data


@attrs.define
class Exchange:
    """One request straight into an ASGI app: streams as slowly as it is read, and can hang up."""

    app: Any
    scope: dict[str, Any]
    to_app: trio.MemorySendChannel[Any]
    from_client: trio.MemoryReceiveChannel[Any]
    to_client: trio.MemorySendChannel[bytes]
    chunks: trio.MemoryReceiveChannel[bytes]
    status: int = 0
    headers: dict[str, str] = attrs.field(factory=dict)

    async def run(self) -> None:
        """Run the app on this request to its end."""

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.status = message["status"]
                for name, value in message["headers"]:  # Several of one name are one list (RFC 9110, section 5.2).
                    before = self.headers.get(key := name.decode().lower())
                    self.headers[key] = value.decode() if before is None else f"{before}, {value.decode()}"
            elif message.get("body"):
                await self.to_client.send(message["body"])

        with self.to_client:
            await self.app(self.scope, self.from_client.receive, send)

    def disconnect(self) -> None:
        """Hang up."""
        self.to_app.send_nowait({"type": "http.disconnect"})

    async def body(self) -> bytes:
        """Read the rest of the response."""
        return b"".join([chunk async for chunk in self.chunks])


@attrs.frozen
class Answer:
    """A whole response."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        """Parse the body."""
        return json.loads(self.body)

    def events(self) -> list[Any]:
        """Parse a stream of events; "[DONE]" stays a string."""
        assert self.body.endswith(b"\n\n"), self.body
        parts = self.body.decode().split("\n\n")[:-1]
        assert all(part.startswith("data: ") for part in parts), parts
        return [part[6:] if part == "data: [DONE]" else json.loads(part[6:]) for part in parts]


async def ask(app: Any, method: str, path: str, body: Any = None, **options: Any) -> Answer:
    """Ask the app in process and return its whole answer; a body that is not bytes is sent as JSON."""
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    call = exchange(app, method, path, data, **options)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(call.run)
        content = await call.body()
    return Answer(call.status, call.headers, content)


def exchange(
    app: Any,
    method: str,
    path: str,
    body: bytes = b"",
    headers: dict[str, str] | None = None,
    *,
    client: tuple[str, int] = ("127.0.0.1", 1),
) -> Exchange:
    """Make an exchange whose request has arrived in full."""
    to_app, from_client = trio.open_memory_channel[Any](10)
    to_client, chunks = trio.open_memory_channel[bytes](0)
    path, _, query = path.partition("?")
    given = {"host": "localhost", "content-type": "application/json", **(headers or {})}
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.1"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in given.items()],
        "client": client,
        "server": ("127.0.0.1", 80),
        "extensions": {},
        "state": {},
    }
    to_app.send_nowait({"type": "http.request", "body": body, "more_body": False})
    return Exchange(app, scope, to_app, from_client, to_client, chunks)


def function(name: str, **properties: Any) -> dict[str, Any]:
    """Return a tool whose arguments are all required."""
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "parameters": parameters}}
