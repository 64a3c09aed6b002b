"""OpenTelemetry: a span for every request to the engine, with its time in the queue, in prefill and in decode.

Off unless `server.otlp_traces_endpoint` is set, and then the only thing in this server that connects to anything. The
names of the attributes are those of OpenTelemetry's GenAI conventions and, where these have none, vLLM's. Spans hold
counts and times; never a prompt or an answer.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import attrs
import trio
from quart import request

from trio_llm.engine import Engine, RequestStats, Stream
from trio_llm.errors import ConfigError
from trio_llm.messages import SamplingParams

if TYPE_CHECKING:
    from quart_trio import QuartTrio

    from trio_llm.server.services import Services

_EXPORT_TIMEOUT_S = 5.0


@attrs.define
class Tracing:
    """Makes the spans of one app.

    Args:
        provider: Where they go, an opentelemetry.sdk TracerProvider; it is shut down with the app.
        engine: Tells what became of each request.
        model: The name it is served under.
    """

    provider: Any
    engine: Engine
    model: str
    _open: dict[int, tuple[Any, int, SamplingParams]] = attrs.field(factory=dict[int, Any], init=False)

    def register(self, app: QuartTrio) -> None:
        """Take the parents of spans from `traceparent` headers, and send what is left when the app ends."""
        from opentelemetry import context, propagate

        self.engine.watch_ended(self._end)

        @app.before_request
        async def adopt() -> None:
            # For this request's own task, which ends with it.
            context.attach(propagate.extract({name.lower(): value for name, value in request.headers.items()}))

        @app.after_serving
        async def flush() -> None:
            with trio.move_on_after(_EXPORT_TIMEOUT_S, shield=True):
                await trio.to_thread.run_sync(self.provider.shutdown, abandon_on_cancel=True)

    def begin(self, streams: Sequence[Stream], params: SamplingParams) -> None:
        """Begin a span for each of these requests, under the one that their client has sent."""
        tracer = self.provider.get_tracer("trio_llm")
        now_ns = time.time_ns()
        for stream in streams:
            self._open[stream.request_id] = (tracer.start_span("llm_request", start_time=now_ns), now_ns, params)
        # Who ends is told of, unless metrics had no room for the report: those are the oldest here.
        while len(self._open) > 2 * self.engine.max_requests:
            del self._open[next(iter(self._open))]

    def _end(self, stats: RequestStats) -> None:
        if (begun := self._open.pop(stats.request_id, None)) is None:
            return
        from opentelemetry import trace

        span, at_ns, params = begun
        span.set_attributes(_attributes(self.model, stats, params))
        if stats.reason == "error":
            span.set_status(trace.StatusCode.ERROR, "the model failed for this request")
        tracer = self.provider.get_tracer("trio_llm")
        within = trace.set_span_in_context(span)
        end_ns = at_ns + _ns(stats.e2e_s)
        for name, seconds in (("queue", stats.queue_s), ("prefill", stats.prefill_s), ("decode", stats.decode_s)):
            if seconds is None:
                break
            phase = tracer.start_span(name, context=within, start_time=at_ns)
            at_ns += _ns(seconds)
            phase.end(at_ns)
        span.end(end_ns)


def register(app: QuartTrio, services: Services) -> None:
    """Send spans to the OTLP endpoint of the settings, in batches and from a thread of its own, if there is one.

    Raises:
        ConfigError: OpenTelemetry is not installed.
    """
    if (endpoint := services.config.server.otlp_traces_endpoint) is None:
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise ConfigError(
            key="server.otlp_traces_endpoint",
            value=endpoint,
            source="configuration",
            allowed="needs OpenTelemetry: pip install 'trio-llm[otel]'",
        ) from None
    provider = TracerProvider(resource=Resource.create({"service.name": "trio-llm"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    services.tracing = Tracing(provider, services.engine, services.names[0])
    services.tracing.register(app)


def _attributes(model: str, stats: RequestStats, params: SamplingParams) -> dict[str, Any]:
    given: dict[str, Any] = {
        "gen_ai.provider.name": "trio_llm",
        "gen_ai.request.model": model,
        "gen_ai.request.id": str(stats.request_id),
        "gen_ai.request.max_tokens": stats.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.response.finish_reasons": (stats.reason,),
        "gen_ai.usage.input_tokens": stats.num_prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": stats.num_cached_tokens,
        "gen_ai.usage.output_tokens": stats.num_generated_tokens,
        "gen_ai.latency.e2e": stats.e2e_s,
        "gen_ai.latency.time_in_queue": stats.queue_s,
        "gen_ai.latency.time_in_model_prefill": stats.prefill_s,
        "gen_ai.latency.time_in_model_decode": stats.decode_s,
        "trio_llm.preemptions": stats.num_preemptions,
    }
    return {name: value for name, value in given.items() if value is not None}


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
