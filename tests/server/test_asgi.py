"""The app under hypercorn's own server and command line, as far as it can be made good there."""

from __future__ import annotations

import json
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from hypercorn.config import Config as HypercornConfig
from hypercorn.trio import serve as hypercorn_serve

from tests.server.helpers import ask, http, read_response, read_to_end
from tests.server.stub import continuation, open_stub
from trio_llm import asgi
from trio_llm.config import Config
from trio_llm.errors import CheckpointError
from trio_llm.server.app import create_app


async def stock_port(app: Any, nursery: trio.Nursery, stop: trio.Event) -> int:
    """Serve `app` with hypercorn's own serve() on a free port."""
    config = HypercornConfig()
    config.bind = ["127.0.0.1:0"]
    config.errorlog = None
    config.keep_alive_timeout = 0.2
    urls = await nursery.start(partial(hypercorn_serve, app, config, shutdown_trigger=stop.wait))
    return int(urls[0].rsplit(":", 1)[1])


async def test_the_edge_mends_hypercorns_own_server() -> None:
    """L5: under stock hypercorn keep-alive, its end, early refusals and Connection: close work because of the edge."""
    async with open_stub() as engine, trio.open_nursery() as nursery:
        stop = trio.Event()
        port = await stock_port(create_app(engine, Config()), nursery, stop)
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            for path, body, status in (
                ("/v1/completions", b'{"prompt": "hello", "max_tokens": 2}', 200),
                ("/nope", bytes(200_000), 404),
                ("/v1/completions", b'{"prompt": "hello", "max_tokens": 2}', 200),
            ):
                await stream.send_all(http("POST", path, body, "Content-Type: application/json"))
                assert (await read_response(stream))[0] == status
            assert await read_to_end(stream) == b""
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(http("GET", "/health", b"", "Connection: close"))
            assert b'"ok"' in await read_to_end(stream)
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            both = http("POST", "/v1/completions", b"0\r\n\r\n", "Transfer-Encoding: chunked")
            await stream.send_all(both)
            assert (await read_response(stream))[0] == 400
        stop.set()


async def test_the_lifespan_opens_the_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The engine lives from startup to shutdown; requests in between are answered."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(asgi, "open_engine", lambda config, **_: open_stub())
    monkeypatch.setattr(asgi, "_serving", None)
    to_app, from_server = trio.open_memory_channel[Any](2)
    to_server, said = trio.open_memory_channel[Any](2)
    async with trio.open_nursery() as nursery:
        nursery.cancel_scope.deadline = trio.current_time() + 30
        nursery.start_soon(asgi.app, {"type": "lifespan", "state": {}}, from_server.receive, to_server.send)
        to_app.send_nowait({"type": "lifespan.startup"})
        assert (await said.receive())["type"] == "lifespan.startup.complete"
        answer = await ask(asgi.app, "POST", "/v1/completions", {"prompt": "hello", "max_tokens": 2})
        assert answer.json()["choices"][0]["text"] == continuation("hello", 2)
        to_app.send_nowait({"type": "lifespan.shutdown"})
        assert (await said.receive())["type"] == "lifespan.shutdown.complete"
    assert not nursery.cancel_scope.cancelled_caught


async def test_a_start_that_fails_ends_the_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A model that cannot be loaded is told as a failed startup: hypercorn would otherwise serve without one."""

    def fail(config: Any, **_: Any) -> Any:
        raise CheckpointError("no such model")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(asgi, "open_engine", fail)
    monkeypatch.setattr(asgi, "_serving", None)
    to_app, from_server = trio.open_memory_channel[Any](1)
    to_server, said = trio.open_memory_channel[Any](1)
    to_app.send_nowait({"type": "lifespan.startup"})
    with pytest.raises(CheckpointError):
        await asgi.app({"type": "lifespan", "state": {}}, from_server.receive, to_server.send)
    assert said.receive_nowait() == {"type": "lifespan.startup.failed", "message": "no such model"}


@pytest.mark.slow
async def test_hypercorns_command_line_serves_the_demo_model(tmp_path: Path) -> None:
    """`hypercorn -k trio trio_llm.server.asgi:app` answers a chat with the demo model and ends on SIGTERM."""
    command = [sys.executable, "-m", "hypercorn", "-k", "trio", "-b", "127.0.0.1:0", "trio_llm.server.asgi:app"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    async with trio.open_nursery() as nursery:
        start = partial(trio.run_process, command, cwd=tmp_path, env=environment, stderr=-1, check=False)
        process: trio.Process = await nursery.start(start)
        assert process.stderr is not None
        log = b""
        while b"Running on http://127.0.0.1:" not in log or not log.endswith(b"\n"):
            chunk = await process.stderr.receive_some()
            assert chunk, log
            log += chunk
        port = int(log.split(b"http://127.0.0.1:")[1].split()[0])
        body = json.dumps({"messages": [{"role": "user", "content": "What is the capital of Japan?"}]}).encode()
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(http("POST", "/v1/chat/completions", body, "Content-Type: application/json"))
            status, _, answer = await read_response(stream)
        assert status == 200
        assert "Tokyo" in json.loads(answer)["choices"][0]["message"]["content"]
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0
