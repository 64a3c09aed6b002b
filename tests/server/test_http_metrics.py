"""What is exported of HTTP: counts and durations by handler, from sets of labels that no client can enlarge."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from tests.server.helpers import ask, exchange
from tests.server.stub import GatedWorker, open_stub
from trio_llm.config import AuthConfig, Config
from trio_llm.server.app import ServerApp, create_app

JSON = {"content-type": "application/json"}


@pytest.fixture
async def app() -> AsyncIterator[ServerApp]:
    """Open a server round a stub."""
    async with open_stub() as engine:
        yield create_app(engine, Config())


async def series(app: Any) -> dict[str, float]:
    """Scrape what is not the engine's, buckets apart."""
    page = (await ask(app, "GET", "/metrics", headers={"x-api-key": "sk"})).body.decode()
    lines = re.findall(r"^((?:http|process|trio_llm)_\w+(?:\{.*\})?) (\S+)$", page, re.MULTILINE)
    return {name: float(value) for name, value in lines if "_bucket" not in name and "_created" not in name}


async def test_every_http_series_moves(app: ServerApp) -> None:
    """A request moves its count, its duration and the process's CPU time; a key moves the gauge that tells of keys."""
    before = await series(app)
    async with open_stub() as engine:
        keyed = await series(create_app(engine, Config(auth=AuthConfig(api_keys=("sk",)))))
    for _ in range(3):
        await ask(app, "POST", "/v1/completions", {"prompt": "a", "max_tokens": 30}, headers=JSON)
    after = await series(app)
    assert (before["trio_llm_auth_enabled"], keyed["trio_llm_auth_enabled"]) == (0, 1)
    assert after["process_cpu_seconds_total"] > before["process_cpu_seconds_total"]
    assert after["process_resident_memory_bytes"] > 0
    label = '{handler="/v1/completions",method="POST"'
    assert after[f'http_requests_total{label},status="200"}}'] == 3
    assert after[f"http_request_duration_seconds_count{label}}}"] == 3
    assert after[f"http_request_duration_seconds_sum{label}}}"] > 0


async def test_monitors_are_not_counted(app: ServerApp) -> None:
    """As in vLLM, what monitors ask all day long leaves no trace in the counts; a path that is not there does."""
    for path in ("/metrics", "/health", "/ready", "/load", "/ping", "/version", "/nowhere"):
        await ask(app, "GET", path)
    names = [name for name in await series(app) if name.startswith("http_")]
    assert all('handler="unmatched"' in name for name in names) and len(names) == 3


async def test_a_streams_duration_is_that_of_the_whole_stream(mock_clock: MockClock) -> None:
    """A stream's time ends with its last byte, or when its reader leaves, not with its first."""
    worker = GatedWorker()
    async with open_stub(worker=worker) as engine:
        app = create_app(engine, Config())
        body = b'{"prompt": "a", "max_tokens": 50, "ignore_eos": true, "stream": true}'
        call = exchange(app, "POST", "/v1/completions", body, headers=JSON)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(call.run)
            worker.let(2)
            await trio.testing.wait_all_tasks_blocked()
            mock_clock.jump(7)
            call.disconnect()
        worker.open = True
        worker.let(1)
        seen = await series(app)
    assert seen['http_request_duration_seconds_sum{handler="/v1/completions",method="POST"}'] == 7


async def test_made_up_methods_and_paths_make_no_series(app: ServerApp) -> None:
    """However many paths and methods clients invent, they share one series each for what they are answered."""
    for number in range(20):
        await ask(app, f"METHOD{number}", f"/path/{number}")
    names = [name for name in await series(app) if "unmatched" in name]
    assert sorted(names) == [
        'http_request_duration_seconds_count{handler="unmatched",method="other"}',
        'http_request_duration_seconds_sum{handler="unmatched",method="other"}',
        'http_requests_total{handler="unmatched",method="other",status="404"}',
    ]
