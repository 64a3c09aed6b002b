"""Probes are answered as connections are accepted, before they have a task, as the app would answer them."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack
from typing import Any

import attrs
import pytest
import trio
import trio.testing

from tests.server.helpers import http, read_response, read_to_end, running
from tests.server.stub import open_stub
from trio_llm.config import AuthConfig, Config, LimitsConfig, ServerConfig
from trio_llm.server.app import ServerApp, create_app
from trio_llm.server.http import accept as accept_module
from trio_llm.server.http.accept import ProbeAnswer, accept_connections
from trio_llm.server.probes import Probes

PROBE = http("GET", "/health", b"", "User-Agent: kube-probe/1.33", "Accept: */*", "Connection: close")


@pytest.fixture
async def app() -> AsyncIterator[ServerApp]:
    """Return an open app behind a key, round the stub."""
    async with open_stub() as engine:
        yield create_app(engine, Config(auth=AuthConfig(api_keys=("sk-0123456789abcdef",))))


async def test_a_probe_is_answered_in_the_middle_of_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe does not wait for the tasks that the event loop has yet to run in this pass, nor for connections."""
    monkeypatch.setattr(accept_module, "_LOOK_EVERY_S", 0.0)
    steps, got = 0, b""

    def answer(head: bytes, peer: str) -> ProbeAnswer | None:
        assert peer == "127.0.0.1"
        return ProbeAnswer(len(head), b"fine", closes=True) if head == PROBE else None

    async def never(stream: trio.SocketStream) -> None:
        await trio.sleep_forever()

    async def step() -> None:
        nonlocal steps, got
        steps += 1
        if steps == 2:  # The clients block; all this is one pass, in whatever order its tasks run.
            for _ in range(20):
                clients.enter_context(socket.create_connection(address)).send(b"POST / HTTP/1.1\r\n\r\n")
            probe.connect(address)
            probe.send(PROBE)
        elif steps == 10:
            probe.setblocking(False)
            got = probe.recv(100)

    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1", backlog=64)
    address = listener.socket.getsockname()
    with ExitStack() as clients:
        probe = clients.enter_context(socket.socket())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept_connections, listener, never, nursery, answer)
            await trio.testing.wait_all_tasks_blocked()
            for _ in range(10):
                nursery.start_soon(step)
            await trio.lowlevel.checkpoint()
            await trio.lowlevel.checkpoint()
            assert (steps, got) == (10, b"fine")
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("path", ["/health", "/ready", "/ping"])
@pytest.mark.parametrize("state", ["ok", "draining", "dead"])
@pytest.mark.parametrize("connection", ["close", "keep-alive"])
async def test_a_probe_gets_what_the_app_answers(app: ServerApp, path: str, state: str, connection: str) -> None:
    """Status, headers and body are those of the route; only the request id and the time differ."""
    app.services.draining = state == "draining"
    if state == "dead":
        app.services.engine.die("test")
    request = http("GET", path, b"", f"Connection: {connection}")
    answers: list[Any] = []
    for settings in ({}, {"answer_probe": app.probes.answer}):
        async with running(app, **settings) as server:
            stream = await server.connect()
            await stream.send_all(request)
            status, headers, body = await read_response(stream)
            assert headers.pop("x-request-id").startswith("req-")
            assert headers.pop("date").endswith(" GMT")
            answers.append((status, headers, body))
            if connection == "close":
                assert await read_to_end(stream) == b""
    assert answers[0] == answers[1]
    quick = app.probes.answer(request, "127.0.0.1")
    assert quick is not None and quick.closes == (connection == "close") and quick.request_bytes == len(request)


async def test_a_connection_goes_on_after_a_probe(app: ServerApp) -> None:
    """After the answer the same connection serves other requests, in parts or pipelined, and other probes."""
    async with running(app, answer_probe=app.probes.answer) as server:
        stream = await server.connect()
        await stream.send_all(http("GET", "/health") + http("GET", "/version"))
        both = b""
        while both.count(b"\r\n\r\n") < 2 or not both.endswith(b"}"):
            both += await stream.receive_some()
        assert both.count(b"HTTP/1.1 200") == 1 and both.count(b"HTTP/1.1 401") == 1
        for path, status in (("/health", 200), ("/v1/models", 401), ("/ready", 200)):
            await stream.send_all(http("GET", path))
            assert (await read_response(stream))[0] == status


async def test_a_kept_connection_s_probe_needs_no_app(app: ServerApp) -> None:
    """On a connection that is kept alive, plain probes are answered at once; others, and parts of one, by the app."""
    seen: list[str] = []

    async def counted(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            seen.append(scope["path"])
        await app(scope, receive, send)

    async with running(counted, answer_probe=app.probes.answer) as server:
        stream = await server.connect()
        for _ in range(3):
            await stream.send_all(http("GET", "/version"))
            assert (await read_response(stream))[0] == 401
            for path in ("/health", "/ready", "/ping"):
                await stream.send_all(http("GET", path))
                assert (await read_response(stream))[0] == 200
        assert seen == ["/version"] * 3
        probe = http("GET", "/health")
        await stream.send_all(probe[:20])
        await trio.testing.wait_all_tasks_blocked()
        await stream.send_all(probe[20:])
        assert (await read_response(stream))[0] == 200
        await stream.send_all(http("GET", "/ready", b"", "Connection: close"))
        assert (await read_response(stream))[0] == 200
        assert await read_to_end(stream) == b""
        assert seen[3:] == ["/health", "/ready"]


async def test_a_probe_is_answered_when_all_connections_are_taken(app: ServerApp) -> None:
    """The limit of connections, which stands for requests, refuses no probe."""
    async with running(app, answer_probe=app.probes.answer, limits=LimitsConfig(max_connections=1)) as server:
        first = await server.connect()
        await first.send_all(http("GET", "/version"))
        assert (await read_response(first))[0] == 401
        second = await server.connect()
        await second.send_all(http("GET", "/version"))
        assert (await read_response(second))[0] == 503
        third = socket.create_connection(("127.0.0.1", server.port))
        third.send(PROBE)  # In one step with the connection: the server sees both at once.
        third.setblocking(False)
        async with trio.SocketStream(trio.socket.from_stdlib_socket(third)) as stream:
            assert (await read_response(stream))[0] == 200


@pytest.mark.parametrize(
    "request_bytes",
    [
        PROBE[:-1],
        PROBE.replace(b"Host", b"Hose"),
        http("GET", "/health", b"", "Host: y"),
        http("GET", "/health", version="1.0"),
        http("GET", "/health", version="1.2"),
        http("GET", "/health?x=1"),
        http("GET", "/healthy"),
        http("GET", "/version"),
        http("GET", "//health"),
        http("HEAD", "/health"),
        http("POST", "/ping"),
        http("GET", "/health", b"{}"),
        http("GET", "/health", b"", "Transfer-Encoding: chunked"),
        http("GET", "/health", b"", "Origin: http://example.com"),
        http("GET", "/health", b"", "X-Forwarded-For: 192.0.2.1"),
        http("GET", "/health", b"", "X-Request-Id: mine"),
        http("GET", "/health", b"", "Expect: 100-continue"),
        http("GET", "/health", b"", "Connection: Upgrade"),
        http("GET", "/health", b"", "bad header"),
        http("GET", "/health", b"", "a : b"),
        b"GET /health\r\n\r\n",
        b"GET  /health HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\r\n" + PROBE,
        b"\x16\x03\x01\x02\x00",
    ],
)  # fmt: skip
def test_all_else_is_left_to_the_app(request_bytes: bytes) -> None:
    """What is not a whole and plain request of a probe is not answered before the app has checked it."""
    untouched: Any = None
    assert Probes(untouched).answer(request_bytes, "127.0.0.1") is None


async def test_an_answer_that_fails_is_left_to_the_app(app: ServerApp, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever a probe trips over, the server goes on, and the app answers."""
    async with running(app, answer_probe=lambda head, peer: 1 / 0) as server:
        stream = await server.connect()
        await stream.send_all(PROBE)
        assert (await read_response(stream))[0] == 200


@pytest.mark.parametrize("log_probes", [False, True])
async def test_probes_are_logged_where_they_are_asked_for(
    app: ServerApp, log_probes: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """--log-probes holds for probes that are answered early."""
    app.services.config = attrs.evolve(app.services.config, server=ServerConfig(log_probes=log_probes))
    with caplog.at_level("INFO", "trio_llm.server.probes"):
        assert app.probes.answer(PROBE, "192.0.2.1") is not None
    assert ("GET /health from 192.0.2.1 200, request req-" in caplog.text) == log_probes
