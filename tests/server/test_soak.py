"""Memory does not grow with the requests served: mixed ones, with grammars, tools, streams, errors and disconnects."""

from __future__ import annotations

import gc
import json
import tracemalloc
from typing import Any

import pytest
import trio

from tests.server.helpers import ask, exchange
from tests.server.soak_mix import LEAVING, MAX_BYTES_PER_REQUEST, mix
from tests.server.stub import StubRunner, open_stub, stub_tokenizer
from trio_llm.config import AuthConfig, Config
from trio_llm.engine import history
from trio_llm.messages import StepPlan, StepResult
from trio_llm.server import services
from trio_llm.server.app import ServerApp, create_app
from trio_llm.server.services import Services

WARM_UP, MEASURED = 120, 25
TOOLS_TEMPLATE = "{% if tools %}{{ tools }}<tool_call>{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"


class ForgetfulRunner(StubRunner):
    """A stub that keeps nothing of requests that have ended, as a real runner."""

    def step(self, plan: StepPlan) -> StepResult:
        result = super().step(plan)
        self.plans.clear()
        for request_id in plan.dropped:
            self._tokens.pop(request_id, None)
            self._matchers.pop(request_id, None)
        return result


async def mixed(app: ServerApp, number: int) -> int:
    """Send one request of each kind; how many these are."""
    requests = mix(number)
    for path, body in requests:
        answer = await ask(app, "POST", path, body, headers={"x-request-id": f"request-{number}"})
        assert answer.status < 500, answer.body
    path, body = LEAVING
    leaving = exchange(app, "POST", path, json.dumps(body).encode())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(leaving.run)
        await leaving.chunks.receive()
        leaving.disconnect()
        await leaving.body()
    return len(requests) + 1


async def bytes_per_request(app: ServerApp) -> float:
    """Return by how much the memory that Python holds grows with a request: the lesser of two growths in a row.

    A table that doubles grows once; what a request leaves behind grows both times.
    """
    growths: list[float] = []
    for _ in range(2):
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        count = sum([await mixed(app, 1000 + number) for number in range(MEASURED)])
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
        growths.append((after - before) / count)
    return min(growths)


@pytest.mark.slow
async def test_memory_does_not_grow_with_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request of a mix leaves at most 64 bytes behind; the control, an object kept of each, is noticed."""
    kept: list[bytes] = []
    hold = Services.hold

    def leaking(self: Services, *args: Any) -> None:
        kept.append(bytes(500))
        hold(self, *args)

    # What is remembered of past requests is so little that the warm-up fills it, and that a resized dict is no leak.
    monkeypatch.setattr(history, "MAX_ROWS", 2000)
    for module in (history, services):
        monkeypatch.setattr(module, "MAX_ENDED", 20)
    tracemalloc.start()  # Before the warm-up: what is freed later must have been counted.
    try:
        async with open_stub(
            ForgetfulRunner(), stub_tokenizer(TOOLS_TEMPLATE), max_batch_size=8, max_waiting_batches=1
        ) as engine:
            app = create_app(engine, Config(auth=AuthConfig(rate_limit_requests=0)))
            for number in range(WARM_UP):  # Fills what is bounded: the trace of steps, caches, buckets.
                await mixed(app, number)
            assert await bytes_per_request(app) <= MAX_BYTES_PER_REQUEST
            monkeypatch.setattr(Services, "hold", leaking)
            assert await bytes_per_request(app) > MAX_BYTES_PER_REQUEST
    finally:
        tracemalloc.stop()
