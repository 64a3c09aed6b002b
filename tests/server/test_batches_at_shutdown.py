"""However a server is told to end in the middle of a batch: no line is lost, doubled, or failed by it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.server.helpers import http, read_response, read_to_end
from tests.server.stub import GatedWorker, StubRunner, continuation, open_stub
from trio_llm.cli import serve
from trio_llm.config import Config, EngineConfig, ServerConfig

LINES = 12
TOKENS = 4


class NoWatchdog:
    """Ends no process: it is the test's own."""

    def arm(self, timeout_s: float) -> None:
        pass


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """Let a signal that comes when the server is gone do nothing."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@asynccontextmanager
async def process(
    monkeypatch: pytest.MonkeyPatch, directory: Path, worker: GatedWorker, timeout_s: float
) -> AsyncIterator[int]:
    """Run all of `trio-llm serve` but the model; yield its port. The block ends when the server has."""
    send, urls = trio.open_memory_channel[str](1)
    monkeypatch.setattr(
        serve, "open_engine", lambda config, **_: open_stub(StubRunner(), worker=worker, max_batch_size=8)
    )
    monkeypatch.setattr(serve, "ready_text", lambda config, info, name, url: send.send_nowait(url) or "")
    server = ServerConfig(data_dir=str(directory), host="127.0.0.1", port=0, shutdown_timeout_s=timeout_s)
    config = Config(server=server, engine=EngineConfig(max_batch_size=8))
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve._Process(config, NoWatchdog()).main)
            yield int((await urls.receive()).rsplit(":", 1)[1])


async def call(port: int, method: str, path: str, body: Any = None) -> Any:
    """Ask the server."""
    data = b"" if body is None else json.dumps(body).encode()
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(http(method, path, data, "Content-Type: application/json", "Connection: close"))
        status, _, answer = await read_response(stream)
        assert status < 300, answer
        return json.loads(answer)


async def until(port: int, batch_id: str, done: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """Ask for a batch until it is as wanted."""
    while not done(batch := await call(port, "GET", f"/v1/batches/{batch_id}")):
        pass
    return batch


async def end(port: int, how: str) -> None:
    """Tell the server to end."""
    for step in how.split(", "):
        if step == "/shutdown":
            async with await trio.open_tcp_stream("127.0.0.1", port) as connection:
                await connection.send_all(http("GET", "/shutdown").replace(b"Host: x", b"Host: localhost"))
                await read_to_end(connection)
        else:
            os.kill(os.getpid(), signal.Signals[step])
        await wait_all_tasks_blocked()


async def stream(port: int, *, task_status: trio.TaskStatus[None]) -> None:
    """Be a client with a long answer."""
    body = json.dumps({"prompt": "live", "max_tokens": 20, "stream": True}).encode()
    async with await trio.open_tcp_stream("127.0.0.1", port) as connection:
        await connection.send_all(http("POST", "/v1/completions", body, "Content-Type: application/json"))
        task_status.started()
        await read_to_end(connection)


HOW = ("SIGTERM", "SIGINT", "/shutdown", "SIGTERM, SIGTERM", "SIGINT, SIGTERM", "/shutdown, SIGINT")


@pytest.mark.parametrize(
    ("how", "timeout_s", "client"),
    [
        (how, timeout_s, client)
        for how, timeout_s, client in product(HOW, (0, 0.05, 30), ("no client", "its stream ends", "its stream is cut"))
        # A long timeout cuts no stream; a second signal does.
        if (client, timeout_s) != ("its stream is cut", 30) or "," in how
    ],
)
async def test_told_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, timeout_s: float, client: str
) -> None:
    """In the middle of a batch, with lines answered, running and not begun: the next start answers the rest."""
    worker = GatedWorker()
    async with trio.open_nursery() as clients:
        async with process(monkeypatch, tmp_path, worker, timeout_s) as port:
            body = {"endpoint": "completions", "prompts": [str(i) for i in range(LINES)], "max_tokens": TOKENS}
            batch_id = (await call(port, "POST", "/v1/batches", body))["id"]
            worker.let(TOKENS + 2)
            await until(port, batch_id, lambda batch: batch["request_counts"]["completed"])
            if client != "no client":
                await clients.start(stream, port)
            await wait_all_tasks_blocked(0.01)
            await end(port, how)
            worker.open = client == "its stream ends"
            worker.let(worker.open)
    worker = GatedWorker()
    worker.open = True
    async with process(monkeypatch, tmp_path, worker, 30) as port:
        batch = await until(port, batch_id, lambda batch: batch["status"] == "completed")
        assert batch["request_counts"] == {"total": LINES, "completed": LINES, "failed": 0}
        await end(port, "SIGTERM")
    output = (tmp_path / "files" / batch["output_file_id"]).read_bytes().splitlines()
    texts = [json.loads(line)["response"]["body"]["choices"][0]["text"] for line in output]
    assert texts == [continuation(str(i), TOKENS) for i in range(LINES)]
    assert len(list((tmp_path / "files").iterdir())) == 2
