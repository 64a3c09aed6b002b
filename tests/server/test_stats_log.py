"""The line of the log that tells what the engine does, in vLLM's words."""

from __future__ import annotations

import logging

import pytest
import trio
from trio.testing import MockClock

from tests.server.helpers import ask, running
from tests.server.stub import GatedWorker, open_stub
from trio_llm.config import Config, ServerConfig
from trio_llm.params import SamplingParams, Submission
from trio_llm.server.app import create_app
from trio_llm.server.observability.stats_log import StatsLog

JSON = {"content-type": "application/json"}


async def test_the_line_tells_the_time_since_the_last_one() -> None:
    """Throughputs are of the interval, gauges of now, and the hit rate of the last prompts there were."""
    now_s = 100.0
    async with open_stub() as engine:
        app = create_app(engine, Config())
        log = StatsLog(engine.registry, lambda: now_s)
        assert log.line() is None
        for _ in range(2):
            await ask(app, "POST", "/v1/completions", {"prompt": "a" * 40, "max_tokens": 10}, headers=JSON)
        await engine.render_metrics()
        now_s += 4
        assert log.line() == (
            "Engine 000: Avg prompt throughput: 20.0 tokens/s, Avg generation throughput: 5.0 tokens/s, "
            "Running: 0 reqs, Waiting: 0 reqs, GPU KV cache usage: 0.0%, Prefix cache hit rate: 40.0%"
        )
        now_s += 4
        assert log.line() is None


@pytest.mark.parametrize(("interval_s", "lines"), [(5.0, 1), (0.0, 0)])
async def test_it_is_logged_while_there_is_work(
    mock_clock: MockClock, caplog: pytest.LogCaptureFixture, interval_s: float, lines: int
) -> None:
    """A line comes every so many seconds while requests run, and none while nothing does; 0 switches it off."""
    caplog.set_level(logging.INFO, "trio_llm.server.observability.stats_log")
    worker = GatedWorker()
    async with open_stub(worker=worker) as engine:
        app = create_app(engine, Config(server=ServerConfig(log_stats_interval_s=interval_s)))
        async with running(app):
            await pass_time(mock_clock)
            assert not caplog.records
            async with engine.open_stream(Submission([3], SamplingParams(max_tokens=5))) as stream:
                worker.let(1)
                await stream.__anext__()
                await pass_time(mock_clock)
                await pass_time(mock_clock)
        told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2 * lines
    assert all("Running: 1 reqs" in line for line in told)


async def pass_time(clock: MockClock) -> None:
    """Let five seconds pass, and everybody notice."""
    await trio.testing.wait_all_tasks_blocked()
    clock.jump(5)
    await trio.testing.wait_all_tasks_blocked()
