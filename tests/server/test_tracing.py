"""OpenTelemetry: what spans say, whose children they are, and that nothing of it is there unless asked for."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import attrs
import pytest
import trio
import trio.lowlevel
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.server.helpers import Answer, ask, running
from tests.server.stub import StubRunner, open_stub
from trio_llm.config import Config, ServerConfig
from trio_llm.engine import Engine
from trio_llm.errors import ConfigError
from trio_llm.messages import StepPlan
from trio_llm.server.app import ServerApp, check_settings, create_app
from trio_llm.server.observability.tracing import Tracing

JSON = {"content-type": "application/json"}
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SECRET = 77


@attrs.define
class Traced:
    """An app under test and its spans."""

    app: ServerApp
    engine: Engine
    exporter: InMemorySpanExporter

    async def complete(self, headers: dict[str, str] | None = None, **body: Any) -> Answer:
        """Ask for a completion of four tokens."""
        body = {"prompt": "abcd", "max_tokens": 3, "ignore_eos": True, **body}
        return await ask(self.app, "POST", "/v1/completions", body, headers={**JSON, **(headers or {})})

    async def spans(self) -> dict[str, list[ReadableSpan]]:
        """Return the spans so far by their names."""
        await self.engine.render_metrics()
        named: dict[str, list[ReadableSpan]] = {}
        for span in self.exporter.get_finished_spans():
            named.setdefault(span.name, []).append(span)
        return named


def fail_on_z(plan: StepPlan) -> None:
    """Break every step that has a certain token in it."""
    if SECRET in plan.token_ids:
        raise ZeroDivisionError


@asynccontextmanager
async def traced_app(runner: StubRunner, **settings: Any) -> AsyncIterator[Traced]:
    """Open an app whose spans stay here."""
    async with open_stub(runner, **settings) as engine:
        app = create_app(engine, Config())
        exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        app.services.tracing = Tracing(provider, engine, "stub", app.services.background)
        app.services.tracing.register(app)
        yield Traced(app, engine, exporter)


@pytest.fixture
async def traced() -> AsyncIterator[Traced]:
    """Open an app whose model fails on one token."""
    async with traced_app(StubRunner(hook=fail_on_z)) as opened:
        yield opened


async def test_a_request_is_a_span_with_its_phases(traced: Traced) -> None:
    """Queue, prefill and decode are children that follow each other within their request, which has the numbers."""
    assert (await traced.complete(temperature=0.5, seed=1)).status == 200
    spans = await traced.spans()
    (request,) = spans["llm_request"]
    phases = [spans[name][0] for name in ("queue", "prefill", "decode")]
    assert {name: len(found) for name, found in spans.items()} == {
        "llm_request": 1,
        "queue": 1,
        "prefill": 1,
        "decode": 1,
        "engine_step": 3,
    }
    at = request.start_time
    for phase in phases:
        assert phase.parent is not None and request.context is not None
        assert phase.parent.span_id == request.context.span_id
        assert phase.start_time == at
        assert phase.end_time is not None
        at = phase.end_time
    assert at is not None and request.end_time is not None
    assert at <= request.end_time + 1000  # Each time is rounded to the nanosecond.
    attributes = dict(request.attributes or {})
    told = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.model": "stub",
        "gen_ai.request.seed": 1,
        "gen_ai.request.max_tokens": 3,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.usage.input_tokens": 4,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.response.finish_reasons": ("length",),
        "trio_llm.steps": 3,
    }
    assert {name: attributes[name] for name in told} == told
    assert not any("abcd" in str(value) for value in attributes.values())


async def test_spans_join_their_clients_trace(traced: Traced) -> None:
    """A `traceparent` header makes a request's span a child of its client's; others begin traces of their own."""
    await traced.complete({"traceparent": f"00-{TRACE}-{PARENT}-01"}, n=2, temperature=1)
    await traced.complete()
    first, second, alone = (await traced.spans())["llm_request"]
    for span in (first, second):
        assert span.parent is not None
        assert (f"{span.parent.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, PARENT)
    assert alone.parent is None


def ids(links: Any) -> list[int]:
    """Return the spans that links lead to."""
    return [link.context.span_id for link in links]


async def test_from_a_request_to_its_steps_and_back(traced: Traced) -> None:
    """Requests side by side have links to exactly the steps that served them, and those have links to them."""
    async with trio.open_nursery() as nursery:
        for tokens in (2, 5):
            nursery.start_soon(lambda tokens=tokens: traced.complete(prompt="cd" * tokens, max_tokens=tokens))
    spans = await traced.spans()
    steps = {span.context.span_id: span for span in spans["engine_step"] if span.context is not None}
    requests = {span.context.span_id: span for span in spans["llm_request"] if span.context is not None}
    assert len(requests) == 2
    for request_id, request in requests.items():
        served = ids(request.links)
        tokens = (request.attributes or {})["gen_ai.usage.output_tokens"]
        assert len(served) == tokens == (request.attributes or {})["trio_llm.steps"]
        assert served == [step_id for step_id, step in steps.items() if request_id in ids(step.links)]
        for step in map(steps.__getitem__, served):
            assert request.start_time <= step.start_time + 1000 and step.end_time <= request.end_time + 1000
    numbers = [(step.attributes or {})["trio_llm.step.number"] for step in steps.values()]
    assert numbers == sorted(set(numbers))
    for step in steps.values():
        attributes = step.attributes or {}
        assert attributes["trio_llm.step.rows"] == len(step.links)
        assert attributes["trio_llm.step.tokens"] >= attributes["trio_llm.step.rows"]
        assert 0 < attributes["trio_llm.step.kv_cache_usage"] <= 1
        # It lies in the trace of the first of them, so that it is sampled as that one is.
        assert step.parent is not None and step.parent.span_id == ids(step.links)[0]
    assert sum((step.attributes or {})["trio_llm.step.prefill_tokens"] for step in steps.values()) == 4 + 10


async def test_what_is_not_sampled_costs_nothing(traced: Traced) -> None:
    """A client that asks for no trace gets none, nor are there spans of the steps that served it alone."""
    await traced.complete({"traceparent": f"00-{TRACE}-{PARENT}-00"})
    tracing = traced.app.services.tracing
    assert tracing is not None
    assert await traced.spans() == {} and tracing._open == {}


async def test_a_long_request_has_a_bounded_number_of_links(traced: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    """Links to the first steps are kept; of the others there is the count, and the spans of the steps themselves."""
    monkeypatch.setattr("trio_llm.server.observability.tracing._LINKED_STEPS", 3)
    await traced.complete(max_tokens=9)
    spans = await traced.spans()
    (request,) = spans["llm_request"]
    assert (request.attributes or {})["trio_llm.steps"] == len(spans["engine_step"]) == 9
    assert ids(request.links) == [step.context.span_id for step in spans["engine_step"][:3] if step.context]


async def test_embeddings_and_lines_of_batches_are_traced(traced: Traced) -> None:
    """A vector, and each line of a batch, is a request with its steps too; it begins a trace of its own."""
    async with running(traced.app):
        await ask(traced.app, "POST", "/v1/embeddings", {"input": "abc"}, headers=JSON)
        body = {"endpoint": "chat/completions", "prompts": ["a", "b"], "max_tokens": 2}
        batch = (await ask(traced.app, "POST", "/v1/batches", body, headers=JSON)).json()
        with trio.fail_after(30):
            while (await ask(traced.app, "GET", f"/v1/batches/{batch['id']}")).json()["status"] != "completed":
                await trio.lowlevel.checkpoint()
        vector, *lines = (await traced.spans())["llm_request"]
    assert (vector.attributes or {})["gen_ai.operation.name"] == "embeddings"
    assert (vector.attributes or {})["gen_ai.usage.input_tokens"] == 3
    assert len(vector.links) == 1
    assert [(line.attributes or {})["gen_ai.operation.name"] for line in lines] == ["chat", "chat"]
    assert all(len(line.links) == 2 and line.parent is None for line in lines)


async def test_a_prompt_in_several_steps_links_to_each() -> None:
    """Where a step has no room for a whole prompt, the request has a link to every step of its prefill."""
    async with traced_app(StubRunner(), max_num_batched_tokens=32) as traced, trio.open_nursery() as nursery:
        for letter in "ab":
            nursery.start_soon(lambda letter=letter: traced.complete(prompt=letter * 20, max_tokens=2))
    first, second = (await traced.spans())["llm_request"]
    assert (len(first.links), len(second.links)) == (2, 3)


async def test_a_failed_request_is_an_error(traced: Traced) -> None:
    """A request that the model fails for has a span with status ERROR, and no phase that it did not reach."""
    assert (await traced.complete(prompt=[SECRET])).status == 500
    assert (await traced.complete(max_tokens=-1)).status == 400
    spans = await traced.spans()
    (failed,) = spans["llm_request"]
    assert failed.status.status_code.name == "ERROR"
    assert "decode" not in spans


async def test_lost_reports_leave_no_spans_behind(traced: Traced) -> None:
    """Requests whose end was never told are forgotten: memory stays bounded."""
    tracing = traced.app.services.tracing
    assert tracing is not None
    traced.engine._metrics.watchers.clear()
    traced.engine._tickets.limit = 3
    for _ in range(20):
        await traced.complete()
    assert len(tracing._open) == 6


def test_without_an_endpoint_nothing_is_loaded() -> None:
    """The server does not import OpenTelemetry unless it is told where to send traces."""
    program = "import sys, trio_llm.server.app; assert not [m for m in sys.modules if m.startswith('opentelemetry')]"
    subprocess.run([sys.executable, "-c", program], check=True)


async def test_a_missing_library_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """An endpoint without OpenTelemetry installed is an error that says what to install."""
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    async with open_stub() as engine:
        with pytest.raises(ConfigError, match=r"pip install 'trio-llm\[otel\]'"):
            create_app(engine, Config(server=ServerConfig(otlp_traces_endpoint="http://127.0.0.1:1/v1/traces")))


@pytest.mark.parametrize("endpoint", ["zzz", "localhost:4318", "file:///etc/passwd", "http://", "http:///v1/traces"])
def test_an_endpoint_is_a_url(endpoint: str) -> None:
    """What no span could be sent to is refused at start; it would fail at every export, beside the requests."""
    with pytest.raises(ConfigError, match="must be like http://localhost:4318/v1/traces"):
        check_settings(Config(server=ServerConfig(otlp_traces_endpoint=endpoint)))


async def test_spans_arrive_at_the_endpoint() -> None:
    """With the setting alone, spans are sent over OTLP when the server ends, if not before."""
    bodies: list[bytes] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as collector:
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{collector.server_port}/v1/traces"
        async with open_stub() as engine:
            app = create_app(engine, Config(server=ServerConfig(otlp_traces_endpoint=url)))
            async with running(app) as server:
                await ask(app, "POST", "/v1/completions", {"prompt": "a", "max_tokens": 2}, headers=JSON)
                await engine.render_metrics()
                server.stop.set()
                with trio.fail_after(60):
                    await server.stopped.wait()
        collector.shutdown()
        thread.join()
    assert b"llm_request" in b"".join(bodies)
    assert b"engine_step" in b"".join(bodies)
    assert b"gen_ai.usage.output_tokens" in b"".join(bodies)
