"""OpenTelemetry: a span for every request to the engine, and one for every step that served it.

A request's time in the queue, in prefill and in decode are its child spans. A step serves requests of many traces: the
step and each request link to each other, and the step is in the trace of the first. Tracing is off unless
`server.otlp_traces_endpoint` is set; it is the only part of this server that opens outgoing connections. Attributes
have the names of OpenTelemetry's GenAI conventions or, where these have none, vLLM's. Spans hold counts and times;
never a prompt or an answer.
"""

from __future__ import annotations

import importlib
import re
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import attrs
import trio
from quart import request

from trio_llm.config import Config, ServerConfig
from trio_llm.engine import Engine, RequestStats, StepReport
from trio_llm.errors import ConfigError
from trio_llm.params import PoolingParams, SamplingParams
from trio_llm.server.background import Background

if TYPE_CHECKING:
    from quart_trio import QuartTrio

Operation = Literal["chat", "text_completion", "embeddings"]
_EXPORT_TIMEOUT_S = 5.0
# A request's links to its steps: its prefill and the beginning of its decode, however long that is.
_LINKED_STEPS = 256


@attrs.define
class _Open:
    """A request with a recorded span."""

    span: Any
    at_ns: int
    params: SamplingParams | PoolingParams
    operation: Operation
    num_steps: int = 0


@attrs.define
class Tracing:
    """Makes the spans of one app.

    Args:
        provider: An opentelemetry.sdk TracerProvider; it is shut down with the app.
        engine: Reports each step and each finished request.
        model: Served name.
        background: Reports failures, which do not affect requests.
    """

    provider: Any
    engine: Engine
    model: str
    background: Background
    _tracer: Any = attrs.field(init=False)
    _open: dict[int, _Open] = attrs.field(factory=dict[int, _Open], init=False)

    def __attrs_post_init__(self) -> None:
        self._tracer = self.provider.get_tracer("trio_llm")

    def register(self, app: QuartTrio) -> None:
        """Take the parents of spans from `traceparent` headers, and flush spans when the app ends."""
        from opentelemetry import context, propagate

        # An exception in them would end the engine's metrics actor, and with it the engine.
        self.engine.watch_steps(self.background.contained("tracing")(self._step))
        self.engine.watch_ended(self.background.contained("tracing")(self._end))

        @app.before_request
        async def adopt() -> None:
            # For this request's own task, which ends with it.
            context.attach(propagate.extract({name.lower(): value for name, value in request.headers.items()}))

        @app.after_serving
        async def flush() -> None:
            with trio.move_on_after(_EXPORT_TIMEOUT_S, shield=True):
                await trio.to_thread.run_sync(self.provider.shutdown, abandon_on_cancel=True)

    def begin(self, request_ids: Sequence[int], params: SamplingParams | PoolingParams, operation: Operation) -> None:
        """Begin a span for each of these requests, with the client's span as parent."""
        now_ns = time.time_ns()
        with self.background.contained("tracing"):
            for request_id in request_ids:
                span = self._tracer.start_span("llm_request", start_time=now_ns)
                if span.is_recording():  # else the request was not sampled
                    self._open[request_id] = _Open(span, now_ns, params, operation)
        # Reports can be dropped, so evict the oldest.
        while len(self._open) > 2 * self.engine.max_requests:
            del self._open[next(iter(self._open))]

    def _step(self, report: StepReport) -> None:
        """Make a span of a step, and links in both directions to the spans of its requests."""
        served = [found for request_id in report.request_ids if (found := self._open.get(request_id)) is not None]
        if not served:
            return
        from opentelemetry import trace

        end_ns = time.time_ns() - _ns(trio.current_time() - report.at_s)
        step = self._tracer.start_span(
            "engine_step",
            # Sampled because the request is.
            context=trace.set_span_in_context(served[0].span),
            links=[trace.Link(found.span.get_span_context()) for found in served],
            attributes=_step_attributes(report),
            start_time=end_ns - _ns(report.stats.seconds),
        )
        for found in served:
            found.num_steps += 1
            if found.num_steps <= _LINKED_STEPS:
                found.span.add_link(step.get_span_context())
        step.end(end_ns)

    def _end(self, stats: RequestStats) -> None:
        if (found := self._open.pop(stats.request_id, None)) is None:
            return
        from opentelemetry import trace

        span, at_ns = found.span, found.at_ns
        span.set_attributes(_attributes(self.model, stats, found))
        if stats.reason == "error":
            span.set_status(trace.StatusCode.ERROR, "the model failed for this request")
        within = trace.set_span_in_context(span)
        end_ns = at_ns + _ns(stats.e2e_s)
        for name, seconds in (("queue", stats.queue_s), ("prefill", stats.prefill_s), ("decode", stats.decode_s)):
            if seconds is None:
                break
            phase = self._tracer.start_span(name, context=within, start_time=at_ns)
            at_ns += _ns(seconds)
            phase.end(at_ns)
        span.end(end_ns)


def check_endpoint(config: ServerConfig) -> None:
    """Raise ConfigError if the settings ask for traces that could not be sent: to no URL, or without OpenTelemetry."""
    if (endpoint := config.otlp_traces_endpoint) is None:
        return
    if re.fullmatch(r"https?://[^\s/?#]+\S*", endpoint) is None:
        raise _refused(endpoint, "must be like http://localhost:4318/v1/traces")
    try:
        for module in ("exporter.otlp.proto.http.trace_exporter", "sdk.trace.export"):
            importlib.import_module(f"opentelemetry.{module}")
    except ImportError:
        raise _refused(endpoint, "needs OpenTelemetry: pip install 'trio-llm[otel]'") from None


def _refused(endpoint: str, allowed: str) -> ConfigError:
    return ConfigError(key="server.otlp_traces_endpoint", value=endpoint, source="configuration", allowed=allowed)


def register(app: QuartTrio, background: Background, engine: Engine, config: Config, model: str) -> Tracing | None:
    """Send spans to the OTLP endpoint of the settings, if there is one, in batches from a separate thread.

    Raises:
        ConfigError: The endpoint is no URL, or OpenTelemetry is not installed.
    """
    if (endpoint := config.server.otlp_traces_endpoint) is None:
        return None
    check_endpoint(config.server)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import SpanLimits, TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    # The SDK keeps only the last links of a span: allow enough for every request and the widest step.
    limits = SpanLimits(max_links=max(_LINKED_STEPS, config.engine.max_batch_size))
    provider = TracerProvider(resource=Resource.create({"service.name": "trio-llm"}), span_limits=limits)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    tracing = Tracing(provider, engine, model, background)
    tracing.register(app)
    return tracing


def _attributes(model: str, stats: RequestStats, found: _Open) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        "gen_ai.operation.name": found.operation,
        "gen_ai.provider.name": "trio_llm",
        "gen_ai.request.model": model,
        "gen_ai.request.id": str(stats.request_id),
        "gen_ai.usage.input_tokens": stats.num_prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": stats.num_cached_tokens,
        "gen_ai.latency.e2e": stats.e2e_s,
        "gen_ai.latency.time_in_queue": stats.queue_s,
        "gen_ai.latency.time_in_model_prefill": stats.prefill_s,
        "gen_ai.latency.time_in_model_decode": stats.decode_s,
        "trio_llm.preemptions": stats.num_preemptions,
        "trio_llm.steps": found.num_steps,
    }
    if isinstance(params := found.params, SamplingParams):
        attributes |= {
            "gen_ai.request.choice.count": params.n,
            "gen_ai.request.max_tokens": stats.max_tokens,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.request.top_k": params.top_k,
            "gen_ai.request.seed": params.seed,
            "gen_ai.request.presence_penalty": params.presence_penalty,
            "gen_ai.request.frequency_penalty": params.frequency_penalty,
            "gen_ai.response.finish_reasons": (stats.reason,),
            "gen_ai.usage.output_tokens": stats.num_generated_tokens,
        }
    return {name: value for name, value in attributes.items() if value is not None}


def _step_attributes(report: StepReport) -> dict[str, Any]:
    stats = report.stats
    attributes: dict[str, Any] = {
        "trio_llm.step.number": stats.step,
        "trio_llm.step.rows": stats.num_rows,
        "trio_llm.step.tokens": stats.num_tokens,
        "trio_llm.step.prefill_tokens": stats.num_prefill_tokens,
        "trio_llm.step.generated_tokens": stats.num_generated_tokens,
        "trio_llm.step.preempted": stats.num_preempted,
        "trio_llm.step.model_seconds": stats.seconds,
        "trio_llm.step.own_seconds": report.own_s,
        "trio_llm.step.waiting": stats.num_waiting,
        "trio_llm.step.kv_cache_usage": sum(stats.blocks.used_blocks) / stats.blocks.total_blocks,
    }
    return {name: value for name, value in attributes.items() if value is not None}


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
