"""One replica, as Ray calls it, round an engine without torch. No Ray here."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from tests.server.stub import continuation, open_stub
from trio_llm.config import Config, EngineConfig, ServerConfig
from trio_llm.engine import Engine
from trio_llm.errors import EngineDeadError
from trio_llm.ray_serve.replica import Replica

DEADLINE_S = 60.0


@asynccontextmanager
async def open_engine(config: Config, *, tune_interpreter: bool) -> AsyncIterator[Engine]:
    """Open the stub."""
    async with open_stub() as engine:
        yield engine


async def ask(replica: Replica, path: str, body: dict[str, Any] | None = None) -> tuple[int, dict[str, str], Any]:
    """Return status, headers and JSON of one answer."""
    sent: list[Any] = []
    received = [{"type": "http.request", "body": b"" if body is None else json.dumps(body).encode()}]

    async def receive() -> Any:
        return received.pop() if received else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "GET" if body is None else "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "http_version": "1.1",
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json"), (b"x-request-id", b"from-ray")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }
    await replica(scope, receive, send)
    start, *parts = sent
    headers = {name.decode(): value.decode() for name, value in start["headers"]}
    return start["status"], headers, json.loads(b"".join(part["body"] for part in parts))


@attrs.define
class Life:
    """The messages with which Ray begins and ends a replica."""

    replica: Replica
    to_app: asyncio.Queue[Any] = attrs.field(factory=asyncio.Queue)
    said: asyncio.Queue[Any] = attrs.field(factory=asyncio.Queue)

    async def run(self) -> None:
        """Run the app's lifespan to its end."""
        await self.replica({"type": "lifespan"}, self.to_app.get, self.said.put)

    async def tell(self, kind: str) -> None:
        """Send a message and expect its answer."""
        await self.to_app.put({"type": kind})
        assert await self.said.get() == {"type": f"{kind}.complete"}


@pytest.mark.parametrize("owns_batches", [True, False])
def test_a_replica_answers_from_its_start_to_its_end(tmp_path: Path, owns_batches: bool) -> None:
    """Like a server, with its name; only an owner has files and batches."""
    config = Config(server=ServerConfig(data_dir=str(tmp_path / "data")), engine=EngineConfig(max_batch_size=4))

    async def main() -> None:
        replica = Replica(config, name="abc", owns_batches=owns_batches, open_engine=open_engine)
        life = Life(replica)
        await replica.open()
        running = asyncio.create_task(life.run())
        await life.tell("lifespan.startup")
        status, headers, answer = await ask(replica, "/v1/completions", {"prompt": "hello", "max_tokens": 3})
        assert (status, headers["x-replica"]) == (200, "abc")
        assert "x-request-id" not in headers, "Ray adds it"
        assert answer["choices"][0]["text"] == continuation("hello", 3)
        for path in ("/v1/files", "/v1/batches"):
            status, _, answer = await ask(replica, path)
            assert status == (200 if owns_batches else 501)
            assert owns_batches or "owns_batches" in answer["error"]["message"]
        await replica.check_health()
        assert await replica.load() == {"trio_llm_requests": 0.0}
        await life.tell("lifespan.shutdown")
        await running

    asyncio.run(asyncio.wait_for(main(), DEADLINE_S))
    assert (tmp_path / "data").exists() == owns_batches


def test_a_replica_ends_with_its_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray would go on sending requests to a process that refuses them fastest of all."""
    kill: list[Any] = []

    @asynccontextmanager
    async def open_dying(config: Config, *, tune_interpreter: bool) -> AsyncIterator[Engine]:
        async with trio.open_nursery() as nursery, open_stub() as engine:
            dying = trio.Event()
            nursery.start_soon(_die, dying)
            kill.append(partial(trio.lowlevel.current_trio_token().run_sync_soon, dying.set))
            yield engine

    async def main() -> None:
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        codes: list[int] = []

        def end(code: int) -> None:
            codes.append(code)
            loop.call_soon_threadsafe(ended.set)

        monkeypatch.setattr(os, "_exit", end)
        replica = Replica(Config(), name="abc", owns_batches=False, open_engine=open_dying)
        await replica.open()
        kill[0]()
        await ended.wait()
        assert codes == [1]
        with pytest.raises(EngineDeadError):
            await replica.check_health()
        with pytest.raises(ExceptionGroup):
            await replica.close()

    asyncio.run(asyncio.wait_for(main(), DEADLINE_S))


async def _die(event: trio.Event) -> None:
    await event.wait()
    raise RuntimeError("an actor has failed")
