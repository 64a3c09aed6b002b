"""What one caller may hold, what probes are told while the server drains, and what the log says."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.server.helpers import ask, exchange
from tests.server.stub import GatedWorker, StubRunner, open_stub
from trio_llm.config import AuthConfig, Config, LimitsConfig, ServerConfig
from trio_llm.server.app import ServerApp, create_app

KEYS = ("first-key-of-callers", "second-key-of-callers")


@asynccontextmanager
async def held_app(worker: GatedWorker, **limits: Any) -> AsyncIterator[ServerApp]:
    """Serve with eight places; requests go on only when the worker lets them."""
    auth = AuthConfig(api_keys=KEYS, rate_limit_requests=0)
    async with open_stub(StubRunner(), worker=worker, max_batch_size=4, max_waiting_batches=1) as engine:
        yield create_app(engine, Config(auth=auth, limits=LimitsConfig(**limits)))


def completion(n: int) -> bytes:
    """Return a request for so many samples."""
    return b'{"prompt": "a", "max_tokens": 2, "temperature": 1, "n": %d}' % n


async def test_one_request_leaves_places_to_others() -> None:
    """A request that would take more than its caller's share is a 400 that names the share and its flag."""
    async with held_app(GatedWorker()) as app:
        answer = await ask(app, "POST", "/v1/completions", completion(5), headers={"x-api-key": KEYS[0]})
    assert (answer.status, answer.json()["error"]["param"]) == (400, "n")
    assert "one caller may have 4" in answer.json()["error"]["message"]
    assert "--max-caller-share" in answer.json()["error"]["message"]


async def test_one_key_leaves_places_to_others() -> None:
    """Beyond its share a key gets a 429, another key is served; what has ended takes no place any more."""
    worker = GatedWorker()
    async with held_app(worker) as app, trio.open_nursery() as nursery:
        first = exchange(app, "POST", "/v1/completions", completion(4), headers={"x-api-key": KEYS[0]})
        nursery.start_soon(first.run)
        await wait_all_tasks_blocked()
        more = await ask(app, "POST", "/v1/completions", completion(1), headers={"x-api-key": KEYS[0]})
        assert (more.status, more.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert "retry-after" in more.headers
        worker.open = True
        worker.let(1)
        other = await ask(app, "POST", "/v1/completions", completion(4), headers={"x-api-key": KEYS[1]})
        assert other.status == 200
        await first.body()
        assert first.status == 200
        assert (await ask(app, "POST", "/v1/completions", completion(4), headers={"x-api-key": KEYS[0]})).status == 200
        assert not app.services._places


async def test_ready_says_that_the_server_drains() -> None:
    """While a shutdown is delayed, /ready is 503 and requests are still served."""
    async with open_stub(StubRunner()) as engine:
        app = create_app(engine, Config())
        assert (await ask(app, "GET", "/ready")).status == 200
        app.services.draining = True
        ready = await ask(app, "GET", "/ready")
        assert (ready.status, ready.json()) == (503, {"status": "draining"})
        assert (await ask(app, "GET", "/health")).status == 200
        assert (await ask(app, "GET", "/v1/models")).status == 200


@pytest.mark.parametrize("log_probes", [False, True])
async def test_the_log_names_unknown_paths_and_leaves_probes_out(
    log_probes: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A 404 is logged with its path, printable and cut short; probes only where they are asked for."""
    async with open_stub(StubRunner()) as engine:
        app = create_app(engine, Config(server=ServerConfig(log_probes=log_probes)))
        with caplog.at_level("INFO", "trio_llm.server.app"):
            await ask(app, "GET", "/v2/nowhere\nfake line" + "x" * 500)
            await ask(app, "GET", "/health")
            await ask(app, "GET", "/ready")
    assert "GET /v2/nowhere%0Afake%20linexxx" in caplog.text
    assert "x" * 300 not in caplog.text
    assert ("GET /health" in caplog.text) == ("GET /ready" in caplog.text) == log_probes


async def test_requests_wait_before_the_scheduler_has_read_them() -> None:
    """While the first step runs, requests that came since are shown as waiting, in the metrics and the health."""
    worker = GatedWorker()
    async with open_stub(StubRunner(), worker=worker) as engine, trio.open_nursery() as nursery:
        app = create_app(engine, Config())
        calls = [exchange(app, "POST", "/v1/completions", completion(1)) for _ in range(7)]
        nursery.start_soon(calls[0].run)
        await wait_all_tasks_blocked()
        for call in calls[1:]:
            nursery.start_soon(call.run)
        await wait_all_tasks_blocked()
        metrics = (await ask(app, "GET", "/metrics")).body.decode()
        (waiting,) = re.findall(r"^vllm:num_requests_waiting\{.*\} (.*)$", metrics, re.MULTILINE)
        health = engine.health()
        worker.open = True
        worker.let(1)
        for call in calls:
            await call.body()
    assert float(waiting) + health.num_running >= 6
    assert health.num_waiting + health.num_running == 7
