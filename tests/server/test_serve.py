"""serve() and the edge survive what the stock stack does not. Numbers L1-L14 name the landmines they are about."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import struct
from contextlib import ExitStack
from typing import Any, cast

import pytest
import trio
import trio.testing
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.utils import LifespanFailureError
from quart import request
from quart_trio import QuartTrio
from trio.testing import wait_all_tasks_blocked

from tests.server.helpers import exchange, http, read_response, read_to_end, running
from trio_llm.config import LimitsConfig
from trio_llm.server.http import connection as connection_module
from trio_llm.server.http import serve as serve_module
from trio_llm.server.http.accept import Acceptor, ProbeAnswer, accept_connections
from trio_llm.server.http.connection import Connection
from trio_llm.server.http.edge import LIFETIME, Edge
from trio_llm.server.http.starts import Starts
from trio_llm.server.http.tcp import detect_dead_peers, queued_bytes

CHUNK = b"x" * 10_000


class Probe:
    """A quart-trio app that says what happened to its handlers."""

    def __init__(self) -> None:
        self.started = trio.Event()
        self.cancelled = trio.Event()
        self.release = trio.Event()
        self.app = app = QuartTrio("probe")
        app.config["RESPONSE_TIMEOUT"] = None
        app.get("/hello")(self.hello)
        app.post("/echo")(self.echo)
        app.post("/early")(self.early)
        app.post("/endless")(self.endless)
        app.post("/wait")(self.wait)
        self.edge = Edge(app=app, limits=LimitsConfig(max_body_bytes=1_000_000))

    async def hello(self) -> str:
        return "hello"

    async def echo(self) -> dict[str, int]:
        return {"bytes": len(await request.get_data())}

    async def early(self) -> tuple[dict[str, int], int]:
        return {"error": 1}, 429

    async def endless(self) -> Any:
        async def chunks() -> Any:
            with self._watch():
                while True:
                    yield CHUNK
                    await trio.lowlevel.checkpoint()

        return self.app.response_class(cast(Any, chunks()), mimetype="text/event-stream")

    async def wait(self) -> str:
        with self._watch():
            await self.release.wait()
        return "released"

    @contextlib.contextmanager
    def _watch(self) -> Any:
        self.started.set()
        try:
            yield
        except (trio.Cancelled, GeneratorExit):
            self.cancelled.set()
            raise


@pytest.fixture
async def probe() -> Probe:
    """Return a fresh one."""
    return Probe()


H2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
UPGRADE = (
    "Upgrade: websocket",
    "Connection: Upgrade",
    "Sec-WebSocket-Key: dGhlIHNhbXBsZQ==",
    "Sec-WebSocket-Version: 13",
)
HOSTILE: dict[str, list[bytes]] = {
    "path bytes": [b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n"],
    "percent path": [b"GET /%ff%fe%00 HTTP/1.1\r\nHost: x\r\n\r\n"],
    "absolute target": [b"GET http://[::1/hello HTTP/1.1\r\nHost: x\r\n\r\n"],
    "star": [b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n"],
    "empty path": [b"GET ?x HTTP/1.1\r\nHost: x\r\n\r\n"],
    "header bytes": ["GET /hello HTTP/1.1\r\nHost: x\r\nX-A: ж\r\n\r\n".encode()],
    "host bytes": [b"GET /hello HTTP/1.1\r\nHost: \xff\r\n\r\n"],
    "two hosts": [b"GET /hello HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"],
    "no host": [b"GET /hello HTTP/1.1\r\n\r\n"],
    "http/3": [b"GET /hello HTTP/3.0\r\nHost: x\r\n\r\n"],
    "length": [b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: abc\r\n\r\n"],
    "two lengths": [b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n"],
    "chunk": [b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n"],
    "chunk after 404": [b"POST /nope HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", b"ZZ\r\n"],
    "chunk in stream": [b"POST /endless HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", b"ZZZ\r\n"],
    "get with body": [b"GET /hello HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc\x00\x01\r\n\r\n"],
    "websocket": [http("GET", "/hello", b"", *UPGRADE), b"\xff\xff\xff\xff\xff"],
    "websocket, bad": [b"GET /hello HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"],
    "h2c": [
        http("GET", "/hello", b"", "Upgrade: h2c", "Connection: Upgrade, HTTP2-Settings", "HTTP2-Settings: AAMAAABk")
    ],
    "h2c, bad": [http("GET", "/hello", b"", "Upgrade: h2c", "Connection: Upgrade", "HTTP2-Settings: !!!!")],
    "h2 preface": [H2_PREFACE + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"],
    # HEADERS frame, stream 1, with a literal ":path" that is not ASCII: ends the stock server.
    "h2 path bytes": [
        H2_PREFACE + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00\x00\x00\x07\x01\x05\x00\x00\x00\x01\x82\x86\x04\x02/\xff"
    ],
    "h2 garbage": [H2_PREFACE + b"GARBAGEGARBAGE"],
    "huge header": [b"GET /hello HTTP/1.1\r\nHost: x\r\nX-A: " + b"a" * 1_000_000 + b"\r\n\r\n"],
    "many headers": [b"GET /hello HTTP/1.1\r\nHost: x\r\n" + b"X-A: 1\r\n" * 200 + b"\r\n"],
    "tls hello": [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64)],
    "zeros": [bytes(4096)],
    "trailing newline": [http("POST", "/wait", b"{}") + b"\r\n"],
    "leaves at once": [b""],
    "leaves in head": [b"GET /hel"],
    "leaves in body": [b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nabc"],
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_hostile_bytes_hurt_their_connection_only(
    probe: Probe, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever one connection sends, the server answers the next one, and nothing of it looks like a failure of ours.

    Several of these end hypercorn's serve().
    """
    async with running(probe.edge, graceful_timeout_s=0) as server:
        hostile = await server.connect()
        with contextlib.suppress(trio.BrokenResourceError):
            for part in HOSTILE[name]:
                await hostile.send_all(part)
        with trio.move_on_after(0.05), contextlib.suppress(trio.BrokenResourceError):
            await hostile.receive_some()
        async with await server.connect() as other:
            await other.send_all(http("GET", "/hello"))
            status, _, body = await read_response(other)
        await hostile.aclose()
        assert (status, body) == (200, b"hello")
    assert not caplog.records


async def test_a_connection_that_fails_fails_alone(
    probe: Probe, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An error nobody foresaw in one connection is logged and ends that connection; the server goes on."""
    create = connection_module._Http11._create_stream
    failures = iter([RuntimeError("unforeseen")])

    async def fail_once(self: Any, *args: Any) -> None:
        for failure in failures:
            raise failure
        await create(self, *args)

    monkeypatch.setattr(connection_module._Http11, "_create_stream", fail_once)
    async with running(probe.edge) as server:
        first, second = await server.connect(), await server.connect()
        await first.send_all(http("GET", "/hello"))
        assert await read_to_end(first) == b""
        await second.send_all(http("GET", "/hello"))
        assert (await read_response(second))[0] == 200
    assert "unforeseen" in caplog.text


async def test_an_app_that_reads_no_body_does_not_block_its_connection(caplog: pytest.LogCaptureFixture) -> None:
    """An app that answers and returns, its request unread, leaves nothing behind that waits for somebody to read it."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await wait_all_tasks_blocked(0.01)  # the body has come, and as much of it as fits waits for the app
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    async with running(app) as server:
        stream = await server.connect()
        await stream.send_all(http("POST", "/", bytes(1_000_000)))
        assert (await read_response(stream))[2] == b"ok"
        assert await read_to_end(stream) == b""
        await stream.aclose()
        server.stop.set()
        await server.stopped.wait()
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_an_app_that_raises_before_it_reads_is_answered_for(caplog: pytest.LogCaptureFixture) -> None:
    """An app that raises while its request still arrives costs its client a 500, and the connection no failure."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await wait_all_tasks_blocked(0.01)
        raise RuntimeError

    async with running(app) as server:
        stream = await server.connect()
        await stream.send_all(http("POST", "/", bytes(1_000_000)))
        assert (await read_response(stream))[0] == 500
        assert await read_to_end(stream) == b""
    assert [record.message for record in caplog.records] == [
        "ASGI Framework Lifespan error, continuing without Lifespan support",
        "a request failed outside its handler",
    ]


async def test_a_refused_client_cannot_keep_talking(probe: Probe, mock_clock: trio.testing.MockClock) -> None:
    """After an error the rest of what a client sends is read for a moment, not for as long as it likes to send."""
    async with running(probe.edge) as server:
        stream = await server.connect()
        await stream.send_all(HOSTILE["zeros"][0])
        assert (await read_response(stream))[0] == 400

        async def talk() -> None:
            for _ in range(10):
                await stream.send_all(b"more")
                await wait_all_tasks_blocked(0.01)
                mock_clock.jump(1)

        with pytest.raises(trio.BrokenResourceError):  # a reset: the server has closed
            await talk()


@pytest.mark.parametrize("name", ["http/3", "length", "chunk", "path bytes", "h2 preface", "huge header", "two hosts"])
async def test_protocol_errors_are_error_objects(probe: Probe, name: str) -> None:
    """A request that is not HTTP, or too much of it, gets OpenAI's error object and an end of the connection."""
    async with running(probe.edge) as server:
        stream = await server.connect()
        await stream.send_all(HOSTILE[name][0])
        status, headers, body = await read_response(stream)
        assert status >= 400
        assert headers["connection"] == "close"
        assert json.loads(body)["error"]["type"] == "invalid_request_error"
        await stream.send_eof()
        assert await read_to_end(stream) == b""


@pytest.mark.parametrize(
    ("request_head", "expected"),
    [
        (b"GET ?x HTTP/1.1\r\nHost: x\r\n\r\n", 400),  # Quart: IndexError, hence 500
        (b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET /hello HTTP/1.1\r\nHost: x\r\n" + b"X-A: 1\r\n" * 100 + b"\r\n", 431),
        (
            b"GET /hello HTTP/1.1\r\nHost: x\r\nX-A: " + b"a" * 20_000 + b"\r\n\r\n",
            431,
        ),  # h11 limits partial heads only
        (b"GET /hello?" + b"a" * 17_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431),
        (b"GET http://elsewhere/hello HTTP/1.1\r\nHost: x\r\n\r\n", 200),
        (b"GET http://elsewhere HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET http://[::1/hello HTTP/1.1\r\nHost: x\r\n\r\n", 400),  # Quart: ValueError, hence 500
    ],
)
async def test_heads_that_no_app_should_see(probe: Probe, request_head: bytes, expected: int) -> None:
    """A target that is no path is a 400, and too much of a head a 431, however fast it arrives."""
    async with running(probe.edge) as server:
        stream = await server.connect()
        await stream.send_all(request_head)
        assert (await read_response(stream))[0] == expected


async def test_both_framings_are_refused(probe: Probe) -> None:
    """L12: Content-Length beside Transfer-Encoding is request smuggling: 400 and close; h11 alone accepts it."""
    async with running(probe.edge) as server:
        stream = await server.connect()
        await stream.send_all(http("POST", "/echo", b"0\r\n\r\n", "Transfer-Encoding: chunked"))
        status, headers, _ = await read_response(stream)
        assert (status, headers["connection"]) == (400, "close")


async def test_responses_let_the_connection_be_reused(probe: Probe) -> None:
    """L5: 50 requests run on one connection, which then closes by itself when it idles; without the edge it stays."""
    limits = LimitsConfig(keep_alive_timeout_s=0.1)
    async with running(probe.edge, limits=limits) as server:
        stream = await server.connect()
        for _ in range(50):
            await stream.send_all(http("POST", "/echo", b"{}"))
            status, _, _ = await read_response(stream)
            assert status == 200
        assert await read_to_end(stream) == b""


async def test_a_request_is_served_if_it_comes_as_the_time_for_it_ends(
    probe: Probe, mock_clock: trio.testing.MockClock
) -> None:
    """An event loop that stood still sees the request and the end of the keep-alive time in one pass."""
    async with running(probe.edge, limits=LimitsConfig(keep_alive_timeout_s=5)) as server:
        stream = await server.connect()
        for _ in range(3):
            os.write(stream.socket.fileno(), http("POST", "/echo", b"{}"))
            mock_clock.jump(6)
            assert (await read_response(stream))[0] == 200
            await wait_all_tasks_blocked()
        mock_clock.jump(6)
        assert await read_to_end(stream) == b""


async def test_a_request_that_waits_for_its_turn_is_served_as_the_server_stops(probe: Probe) -> None:
    """What the server has read before it stops gets its answer, also what a burst holds up."""
    async with running(probe.edge, graceful_timeout_s=3600) as server:
        clients = [await server.connect() for _ in range(100)]
        for stream in clients:
            await stream.send_all(http("GET", "/hello"))
            await read_response(stream)
        await wait_all_tasks_blocked()
        for stream in clients:
            os.write(stream.socket.fileno(), http("GET", "/hello"))
        await trio.lowlevel.checkpoint()
        await trio.lowlevel.checkpoint()
        server.stop.set()
        assert [(await read_response(stream))[0] for stream in clients] == [200] * 100
        await server.stopped.wait()


async def test_a_client_that_pipelines_much_and_leaves_is_forgotten(probe: Probe) -> None:
    """More than a disconnect is looked for behind: the next write that fails ends the connection, too."""
    async with running(probe.edge, graceful_timeout_s=3600) as server:
        stream = await server.connect()
        await stream.send_all(http("POST", "/endless", b"{}"))
        await stream.receive_some()
        await stream.send_all(b"G" * 3 * connection_module._MAX_PIPELINED_BYTES)
        await wait_all_tasks_blocked(0.05)
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await stream.aclose()
        await probe.cancelled.wait()
        server.stop.set()
        await server.stopped.wait()


async def test_stopping_does_not_wait_for_a_client_that_reads_no_answers_to_probes() -> None:
    """No request of it is under way, though an answer is being written."""
    config, context = serve_module._hypercorn_config(LimitsConfig()), WorkerContext(None)
    answer = ProbeAnswer(len(head := http("GET", "/health")), bytes(2**24), closes=False)
    none: Any = None
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        socket.create_connection(listening.getsockname()) as client,
    ):
        client.sendall(head)
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(listening.accept()[0]))
        connection = Connection(stream, none, config, context, LimitsConfig(), Starts(lambda _head, _peer: answer))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.run)
            await wait_all_tasks_blocked()
            assert connection._writing.locked()
            await context.terminated.set()
            connection.close_if_idle()


async def test_what_follows_an_error_is_no_probe() -> None:
    """It is read and discarded: an answer would fail, and reset the connection under the error."""
    config, seen, none = serve_module._hypercorn_config(LimitsConfig()), list[bytes](), cast(Any, None)
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.socket() as client:
        client.connect(listening.getsockname())
        client.sendall(bad := b"no HTTP\r\n\r\n")
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(listening.accept()[0]))
        starts = Starts(lambda head, _peer: seen.append(head))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Connection(stream, none, config, WorkerContext(None), LimitsConfig(), starts).run)
            await wait_all_tasks_blocked()
            client.sendall(http("GET", "/health"))
            await wait_all_tasks_blocked(0.01)
            assert client.recv(10_000).startswith(b"HTTP/1.1 400 ")
            client.close()
        assert seen == [bad]


@pytest.mark.parametrize("how", ["Connection: close", "HTTP/1.0"])
async def test_asking_to_close_closes(probe: Probe, how: str) -> None:
    """L5: Connection: close and HTTP/1.0 end the connection after the response; without the edge neither does."""
    ask = http("GET", "/hello", b"", how) if ":" in how else http("GET", "/hello", version="1.0")
    async with running(probe.edge) as server:
        stream = await server.connect()
        await stream.send_all(ask)
        assert (await read_to_end(stream)).endswith(b"hello")


async def test_early_responses_leave_the_connection_usable(probe: Probe) -> None:
    """A response sent before its 200 kB body arrived is read whole, and the next request on the connection works."""
    async with running(probe.edge) as server:
        stream = await server.connect()
        for _ in range(20):
            await stream.send_all(http("POST", "/early", bytes(200_000)))
            status, _, _ = await read_response(stream)
            assert status == 429
        await stream.send_all(http("GET", "/hello"))
        assert (await read_response(stream))[0] == 200


async def test_a_body_that_never_comes_ends_the_connection(probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    """L6: a client that promises a body and stalls gets its refusal after the grace, and Connection: close."""
    monkeypatch.setattr("trio_llm.server.http.edge._BODY_GRACE_S", 0.05)
    async with running(probe.edge) as server:
        stream = await server.connect()
        await stream.send_all(b"POST /early HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
        status, headers, _ = await read_response(stream)
        assert (status, headers["connection"]) == (429, "close")
        assert await read_to_end(stream) == b""


@pytest.mark.parametrize("leaving", ["close", "half-close", "pipelined"])
async def test_a_client_that_leaves_cancels_its_handler(probe: Probe, leaving: str) -> None:
    """A handler that waits is cancelled when its client leaves, even one that sent a newline behind its body."""
    async with running(probe.edge) as server:
        stream = await server.connect()
        await stream.send_all(http("POST", "/wait", b"{}") + (b"\r\n" if leaving == "pipelined" else b""))
        await probe.started.wait()
        await (stream.send_eof() if leaving == "half-close" else stream.aclose())
        await probe.cancelled.wait()


@pytest.mark.parametrize("at_once", [True, False])
async def test_pipelined_requests_are_answered_in_order(probe: Probe, at_once: bool) -> None:
    """Requests sent before the first answer, together or one after the other, are kept and answered in order."""
    parts = [http("POST", "/wait", b"{}"), http("GET", "/hello"), http("POST", "/echo", b"12", "Connection: close")]
    async with running(probe.edge) as server:
        stream = await server.connect()
        for part in [b"".join(parts)] if at_once else parts:
            await stream.send_all(part)
            await probe.started.wait()
            await wait_all_tasks_blocked(0.01)
        probe.release.set()
        answers = await read_to_end(stream)
        assert answers.index(b"released") < answers.index(b"hello") < answers.index(b'"bytes":2')


async def test_a_request_may_take_longer_than_its_head(probe: Probe, mock_clock: trio.testing.MockClock) -> None:
    """The time for a head ends with the head: a request that is being answered has no such limit."""
    async with running(probe.edge) as server:
        stream = await server.connect()
        await stream.send_all(http("POST", "/wait", b"{}"))
        await probe.started.wait()
        mock_clock.jump(3600)
        await wait_all_tasks_blocked(0.01)
        probe.release.set()
        assert (await read_response(stream))[0] == 200


@pytest.mark.parametrize("name", ["websocket", "websocket, bad", "h2c", "h2c, bad"])
async def test_upgrades_are_not_taken(probe: Probe, name: str) -> None:
    """L14: a request that offers to switch to WebSocket or h2c is answered as the HTTP/1.1 request that it is."""
    async with running(probe.edge) as server:
        stream = await server.connect()
        await stream.send_all(HOSTILE[name][0])
        status, _, body = await read_response(stream)
        assert (status, body) == (200, b"hello")


async def test_peers_that_vanish_are_looked_for(probe: Probe) -> None:
    """A peer that disappears without a word is given up by the kernel: keep-alive probes and a limit on unread data."""
    listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
    async with listener, await trio.testing.open_stream_to_socket_listener(listener) as stream:
        detect_dead_peers(stream.socket, 30.0)
        assert stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert stream.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 30_000


async def test_a_client_that_does_not_read_is_dropped(probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    """L2: a stream nobody reads ends after the write timeout, also where the kernel knows none; hypercorn waits on."""
    monkeypatch.setattr("trio_llm.server.http.connection.detect_dead_peers", lambda sock, timeout_s: None)
    async with running(probe.edge, limits=LimitsConfig(write_timeout_s=0.1)) as server:
        stream = await server.connect(receive_buffer_bytes=4096)
        await stream.send_all(http("POST", "/endless", b"{}"))
        await probe.cancelled.wait()


async def test_a_client_that_does_not_read_cannot_delay_the_end(probe: Probe) -> None:
    """L2: with a stalled stream and a write timeout of minutes, stopping takes the grace and no more."""
    async with running(probe.edge, graceful_timeout_s=0.05, limits=LimitsConfig(write_timeout_s=600)) as server:
        stream = await server.connect(receive_buffer_bytes=4096)
        await stream.send_all(http("POST", "/endless", b"{}"))
        await wait_all_tasks_blocked(0.05)
        server.stop.set()
        await server.stopped.wait()
        assert probe.cancelled.is_set()


async def test_stopping_lets_requests_end_and_closes_idle_connections(probe: Probe) -> None:
    """After the trigger an idle connection closes at once, new ones are refused, a running request ends well."""
    limits = LimitsConfig(keep_alive_timeout_s=3600)
    async with running(probe.edge, graceful_timeout_s=3600, limits=limits) as server:
        idle, busy = await server.connect(), await server.connect()
        await idle.send_all(http("GET", "/hello"))
        await read_response(idle)
        await busy.send_all(http("POST", "/wait", b"{}"))
        await probe.started.wait()
        server.stop.set()
        assert await read_to_end(idle) == b""
        with pytest.raises(OSError, match="refused"):
            await server.connect()
        assert not server.stopped.is_set()
        probe.release.set()
        status, _, body = await read_response(busy)
        assert (status, body) == (200, b"released")
        await server.stopped.wait()


async def test_last_call_comes_when_the_grace_is_over(probe: Probe) -> None:
    """Requests that outlive the grace are told by last_call and get a moment to end themselves."""
    async with running(probe.edge, graceful_timeout_s=0.01, last_call=probe.release.set) as server:
        stream = await server.connect()
        await stream.send_all(http("POST", "/wait", b"{}"))
        await probe.started.wait()
        server.stop.set()
        assert (await read_response(stream))[2] == b"released"


async def test_one_connection_too_many_is_told_so(probe: Probe) -> None:
    """The connection beyond the cap gets a 503 error object; when one closes, the next is served again."""
    async with running(probe.edge, limits=LimitsConfig(max_connections=1)) as server:
        first = await server.connect()
        await first.send_all(http("GET", "/hello"))
        await read_response(first)
        second = await server.connect()
        await second.send_all(http("GET", "/hello"))
        status, headers, body = await read_response(second)
        assert (status, headers["retry-after"]) == (503, "1")
        assert json.loads(body)["error"]["type"] == "service_unavailable_error"
        await first.aclose()
        await wait_all_tasks_blocked(0.01)
        third = await server.connect()
        await third.send_all(http("GET", "/hello"))
        assert (await read_response(third))[0] == 200


async def test_one_remote_peer_has_so_many_connections(probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer's connection beyond its cap gets the 503 until one closes; this machine's own are not counted by peer."""
    async with running(probe.edge, limits=LimitsConfig(max_connections_per_peer=1)) as server:

        async def status() -> tuple[int, trio.SocketStream]:
            stream = await server.connect()
            await stream.send_all(http("GET", "/hello"))
            return (await read_response(stream))[0], stream

        assert [(await status())[0] for _ in range(3)] == [200] * 3
        monkeypatch.setattr(serve_module, "is_loopback", lambda address: False)
        code, first = await status()
        assert code == 200
        assert (await status())[0] == 503
        await first.aclose()
        await wait_all_tasks_blocked(0.01)
        assert (await status())[0] == 200


async def test_slow_request_heads_time_out(probe: Probe, mock_clock: trio.testing.MockClock) -> None:
    """The time for a head counts from its connection and not from its last byte: dripping does not help."""
    async with running(probe.edge, limits=LimitsConfig(header_timeout_s=5)) as server:
        stream = await server.connect()
        for part in (b"GET /hello", b" HTTP/1.1\r\n", b"Host: x\r\n"):
            await stream.send_all(part)
            await wait_all_tasks_blocked(0.01)
            mock_clock.jump(2)
        assert await read_to_end(stream) == b""


async def test_streams_are_framed_as_chunks(probe: Probe) -> None:
    """Chunks framed without h11 are what an HTTP client expects, ending included."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for part in (b"a", b"", b"bc" * 5000):
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async with running(Edge(app=app, limits=LimitsConfig(max_body_bytes=1_000_000))) as server:
        stream = await server.connect()
        await stream.send_all(http("GET", "/", b"", "Connection: close"))
        _, _, body = (await read_to_end(stream)).partition(b"\r\n\r\n")
        assert body == b"1\r\na\r\n2710\r\n" + b"bc" * 5000 + b"\r\n0\r\n\r\n"


async def test_an_app_that_raises_is_answered_and_does_not_spread() -> None:
    """An exception that leaves the app is a 500 error object without its text; the server goes on."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("secret path /etc")

    async with running(Edge(app=app, limits=LimitsConfig(max_body_bytes=1_000_000))) as server:
        for _ in range(2):
            stream = await server.connect()
            await stream.send_all(http("GET", "/"))
            status, _, body = await read_response(stream)
            assert status == 500
            assert json.loads(body)["error"]["type"] == "internal_server_error"
            assert b"secret" not in body


async def test_chunks_of_one_byte_are_a_body(probe: Probe) -> None:
    """CVE-2025-23310: a body in thousands of chunks of a byte is read like any other, and its connection lives on."""
    async with running(probe.edge) as server:
        stream = await server.connect()
        await stream.send_all(b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        await stream.send_all(b"1\r\nx\r\n" * 5000 + b"0\r\n\r\n")
        assert json.loads((await read_response(stream))[2]) == {"bytes": 5000}
        await stream.send_all(http("GET", "/hello"))
        assert (await read_response(stream))[0] == 200


async def test_an_app_sees_no_more_of_a_body_than_it_may() -> None:
    """A chunked body without end costs the memory of its limit: the rest is read off the connection and dropped."""
    sizes: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (message := await receive()).get("more_body"):
            sizes.append(len(message["body"]))
        await send({"type": "http.response.start", "status": 413, "headers": []})
        await send({"type": "http.response.body"})

    async with running(Edge(app=app, limits=LimitsConfig(max_body_bytes=100_000))) as server:
        stream = await server.connect()
        await stream.send_all(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n")
        for _ in range(100):
            await stream.send_all(b"2710\r\n" + CHUNK + b"\r\n")
        await stream.send_all(b"0\r\n\r\n")
        assert (await read_response(stream))[0] == 413
    assert 100_000 < sum(sizes) <= 100_000 + 65_536


async def test_lifetime_ends_with_the_request_however_it_ends() -> None:
    """What a handler leaves to the request's lifetime is closed when its client leaves, in a cancelled task too."""
    closed = trio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        lifetime = scope[LIFETIME]
        lifetime.stack.callback(closed.set)
        lifetime.nursery.start_soon(trio.sleep_forever)
        while (await receive())["type"] != "http.disconnect":
            pass

    call = exchange(Edge(app=app, limits=LimitsConfig(max_body_bytes=1_000_000)), "POST", "/")
    call.disconnect()
    await call.run()
    assert closed.is_set()


async def test_an_app_that_cannot_start_is_never_announced() -> None:
    """Where the app's start fails, nobody is told that it serves, and its reason comes out of serve()."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "the disk is full"})

    with pytest.RaisesGroup(pytest.RaisesExc(LifespanFailureError, match="the disk is full"), flatten_subgroups=True):
        async with running(app):
            raise AssertionError("it was announced")


async def test_a_burst_of_connections_is_accepted_in_few_passes() -> None:
    """Connections that wait together are accepted together, not one in each pass of the event loop."""
    accepted: list[trio.SocketStream] = []

    async def handle(stream: trio.SocketStream) -> None:
        accepted.append(stream)

    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1", backlog=64)
    address = listener.socket.getsockname()
    with ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(socket.create_connection(address))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept_connections, listener, handle, nursery)
            for _ in range(6):
                await trio.lowlevel.checkpoint()
            assert len(accepted) == 40
            nursery.cancel_scope.cancel()
    for stream in accepted:
        await stream.aclose()
    assert listener.socket.fileno() == -1


async def test_accepting_goes_on_after_files_ran_out(
    autojump_clock: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a free file descriptor accepting waits and goes on; a connection that broke before it is skipped.

    The log has one line a minute of it, not one for each of 1,200 attempts.
    """
    errors = [OSError(errno.EMFILE, "too many files") for _ in range(1200)] + [OSError(errno.ECONNABORTED, "gone")]
    connections: list[socket.socket] = []
    accepted: list[trio.SocketStream] = []
    done = trio.Event()

    class Sock:
        def accept(self) -> Any:
            if errors:
                raise errors.pop(0)
            if connections:
                return connections.pop(), None
            raise BlockingIOError

    async def readable(sock: object) -> None:
        await trio.lowlevel.checkpoint()

    async def handle(stream: trio.SocketStream) -> None:
        accepted.append(stream)
        done.set()

    monkeypatch.setattr(trio.lowlevel, "wait_readable", readable)
    left, right = socket.socketpair()
    connections.append(left)
    with right:
        async with trio.open_nursery() as nursery:
            began = trio.current_time()
            acceptor = Acceptor(cast("socket.socket", Sock()), handle, nursery, lambda _head, _peer: None)
            nursery.start_soon(acceptor.accept)
            nursery.start_soon(acceptor.start_accepted)
            await done.wait()
            assert trio.current_time() - began == pytest.approx(120)
            nursery.cancel_scope.cancel()
        assert len(caplog.records) == 2
        await accepted[0].aclose()


async def test_probes_do_not_wait_for_a_burst() -> None:
    """Few requests begin in a pass of the event loop; /health is never among those that wait."""
    starts, begun = Starts(), []

    async def begin(head: bytes) -> None:
        await starts.turn(head)
        begun.append(head)

    async with trio.open_nursery() as nursery:
        for _ in range(100):
            nursery.start_soon(begin, b"POST /v1/completions HTTP/1.1")
        nursery.start_soon(begin, b"GET /health HTTP/1.1")
        await trio.lowlevel.checkpoint()
        await trio.lowlevel.checkpoint()
        assert begun.count(b"GET /health HTTP/1.1") == 1
        assert len(begun) < 20
    assert len(begun) == 101


async def test_a_burst_costs_no_client_its_time_for_headers(autojump_clock: Any) -> None:
    """A client that has sent its request is not dropped because the server begins it late."""

    class Late(Starts):
        async def turn(self, head: bytes) -> None:
            await trio.sleep(60)

    none: Any = None
    connection = Connection(none, none, none, none, LimitsConfig(header_timeout_s=5), Late())
    connection._receiving.deadline = trio.current_time() + 5
    await trio.sleep(2)
    await connection._wait_for_turn(b"GET / HTTP/1.1")
    assert connection._receiving.deadline == trio.current_time() + 3


@pytest.mark.parametrize("sent", [http("GET", "/hello"), b"GET /hel", b""])
async def test_a_connection_that_begins_as_the_server_stops_is_served_what_it_has_sent(
    probe: Probe, sent: bytes
) -> None:
    """It was accepted before. Nobody waits for what it has not sent yet."""
    config, context = serve_module._hypercorn_config(LimitsConfig()), WorkerContext(None)
    await context.terminated.set()
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        socket.create_connection(listening.getsockname()) as client,
    ):
        client.sendall(sent)
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(listening.accept()[0]))
        await Connection(stream, probe.edge, config, context, LimitsConfig()).run()
        received = client.recv(1000)
    assert received.endswith(b"hello") if sent.endswith(b"\r\n") else not received


async def test_a_slow_reader_is_not_dropped_and_a_stalled_one_is(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: Any
) -> None:
    """The write timeout counts time in which the client reads nothing, however long a whole chunk takes."""
    left, right = socket.socketpair()
    # What the kernel holds: at first, after the first bytes, and then after each timeout.
    held = iter([0, 100, 90, 80, 80])
    monkeypatch.setattr(connection_module, "queued_bytes", lambda _: next(held))
    with right:
        async with trio.SocketStream(trio.socket.from_stdlib_socket(left)) as stream:
            none: Any = None
            connection = Connection(stream, none, none, none, LimitsConfig(write_timeout_s=30))
            began = trio.current_time()
            assert not await connection._send_steadily(memoryview(bytes(2**24)))
            assert trio.current_time() - began == 90


async def test_the_kernel_says_what_a_client_has_not_read() -> None:
    """What the client's buffer has no room for counts, and what it reads no longer does."""
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(listening.getsockname())
        async with trio.SocketStream(trio.socket.from_stdlib_socket(listening.accept()[0])) as stream:
            size = await stream.socket.send(bytes(200_000))
            before = queued_bytes(stream.socket)
            assert 0 < before < size
            client.recv(size, socket.MSG_WAITALL)
            assert queued_bytes(stream.socket) == 0
