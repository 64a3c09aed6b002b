"""Background tasks: one that dies is restarted and shown in /health, and what cannot be restarted ends the server."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import attrs
import pytest
import trio
import trio.testing
from prometheus_client import CollectorRegistry
from trio.testing import MockClock

from tests.server.helpers import ask, running
from tests.server.stub import open_stub
from trio_llm.config import Config, ServerConfig
from trio_llm.server.app import ServerApp, create_app
from trio_llm.server.background import Background
from trio_llm.server.batches.runner import BatchRunner
from trio_llm.server.http.serve import LifespanEndedError
from trio_llm.server.observability.stats_log import StatsLog
from trio_llm.server.observability.tracing import Tracing


@attrs.define
class Faulty:
    """A task that fails as often as it is told, and then runs on."""

    failures: int
    began_s: list[float] = attrs.field(factory=list)

    async def __call__(self) -> None:
        self.began_s.append(trio.current_time())
        if len(self.began_s) <= self.failures:
            raise ZeroDivisionError
        await trio.sleep_forever()


def count(registry: CollectorRegistry, name: str) -> float | None:
    """Return how often a task has failed, as /metrics tells."""
    return registry.get_sample_value("trio_llm_background_task_failures_total", {"task": name})


async def test_pauses_double_up_to_a_minute(autojump_clock: MockClock) -> None:
    """A task that keeps failing is restarted after 1, 2, 4 ... seconds, and never after more than 60."""
    task, registry = Faulty(9), CollectorRegistry()
    background = Background(registry)
    with trio.move_on_after(1000):
        await background.keep_running("x", task)
    pauses = [later - earlier for earlier, later in pairwise(task.began_s)]
    assert pauses == pytest.approx([1, 2, 4, 8, 16, 32, 60, 60, 60])
    assert count(registry, "x") == 9


async def test_a_task_that_ran_well_for_a_while_begins_with_a_short_pause_again(autojump_clock: MockClock) -> None:
    """Failures far apart are not one trouble that grows."""
    began_s: list[float] = []

    async def task() -> None:
        began_s.append(trio.current_time())
        await trio.sleep(100)
        raise ZeroDivisionError

    with trio.move_on_after(1000):
        await Background(CollectorRegistry()).keep_running("x", task)
    assert [later - earlier for earlier, later in pairwise(began_s)] == pytest.approx([101] * 9)


async def test_failing_from_the_failure_until_it_has_run_again(mock_clock: MockClock) -> None:
    """It is shown while the task waits and for as long again after the restart; then all is well."""
    background = Background(CollectorRegistry())
    async with trio.open_nursery() as nursery:
        assert not background.is_failing
        nursery.start_soon(background.keep_running, "x", Faulty(1))
        await trio.testing.wait_all_tasks_blocked()
        for seconds, failing in ((0, True), (1, True), (0.5, True), (0.5, False)):
            mock_clock.jump(seconds)
            await trio.testing.wait_all_tasks_blocked()
            assert background.is_failing is failing
        nursery.cancel_scope.cancel()


async def health(app: ServerApp) -> tuple[int, str]:
    """Ask for /health."""
    answer = await ask(app, "GET", "/health")
    return answer.status, answer.json()["status"]


def fail(*_: Any) -> Any:
    """Fail."""
    raise ZeroDivisionError


@pytest.mark.parametrize(
    ("kind", "method", "task"),
    [
        (BatchRunner, "_unfinished", "batches"),
        (BatchRunner, "_give_places", "batches"),
        (StatsLog, "line", "stats log"),
    ],
)
async def test_every_dead_task_shows_in_health(
    tmp_path, monkeypatch: pytest.MonkeyPatch, mock_clock: MockClock, kind: type, method: str, task: str
) -> None:
    """Whatever a task dies of, requests are served, /health says "degraded", and it runs again."""
    real = getattr(kind, method)
    monkeypatch.setattr(kind, method, fail)
    config = Config(server=ServerConfig(data_dir=str(tmp_path), log_stats_interval_s=5))
    async with open_stub() as engine:
        app = create_app(engine, config)
        async with running(app):
            for _ in range(100):
                if (state := await health(app)) != (200, "ok"):
                    break
                mock_clock.jump(0.1)
                await trio.testing.wait_all_tasks_blocked()
            assert state == (503, "degraded")
            assert (await ask(app, "POST", "/v1/completions", {"prompt": "x", "max_tokens": 1})).status == 200
            page = (await ask(app, "GET", "/metrics")).body.decode()
            assert f'trio_llm_background_task_failures_total{{task="{task}"}}' in page
            monkeypatch.setattr(kind, method, real)
            for _ in range(10):
                mock_clock.jump(10)
                await trio.testing.wait_all_tasks_blocked()
            assert await health(app) == (200, "ok")


async def test_tracing_that_fails_ends_no_request_and_no_engine(mock_clock: MockClock) -> None:
    """A fault in making spans is counted and shown; requests do not notice it."""
    async with open_stub() as engine:
        app = create_app(engine, Config())
        services = app.services
        services.tracing = Tracing(
            type("Provider", (), {"get_tracer": lambda *_: None})(), engine, "m", services.background
        )
        services.tracing.register(app)
        async with running(app):
            assert (await ask(app, "POST", "/v1/completions", {"prompt": "x", "max_tokens": 3})).status == 200
            await trio.testing.wait_all_tasks_blocked()
            assert await health(app) == (503, "degraded")
            mock_clock.jump(61)
            assert await health(app) == (200, "ok")


class PanicException(BaseException):
    """What Rust libraries raise."""


@pytest.mark.parametrize("error", [PanicException, KeyError])
async def test_a_lifespan_that_ends_ends_the_server(error: type[BaseException]) -> None:
    """The app's own nursery is not left without anybody noticing: serve raises."""
    app_fails = trio.Event()

    async with open_stub() as engine:
        app = create_app(engine, Config())

        async def die() -> None:
            await app_fails.wait()
            raise error

        @app.before_serving
        async def start() -> None:
            app.nursery.start_soon(die)

        async def serve() -> None:
            async with running(app):
                app_fails.set()
                await trio.sleep_forever()

        with pytest.raises(BaseExceptionGroup) as caught:
            await serve()
        assert caught.group_contains(LifespanEndedError)
