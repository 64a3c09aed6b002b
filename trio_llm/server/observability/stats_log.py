"""One log line every few seconds while there is work, in vLLM's format, so that tools for its logs can read it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import attrs
import trio
from prometheus_client import CollectorRegistry
from quart_trio import QuartTrio

from trio_llm.server.background import Background

logger = logging.getLogger(__name__)

_COUNTERS = (
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
)
_GAUGES = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")


@attrs.define
class StatsLog:
    """Statistics since the last line.

    Args:
        registry: The engine's.
        clock: Seconds.
    """

    registry: CollectorRegistry
    clock: Callable[[], float]
    _at_s: float = attrs.field(init=False)
    _before: Mapping[str, float] = attrs.field(init=False)
    _hit_rate: float = attrs.field(default=0.0, init=False)

    def __attrs_post_init__(self) -> None:
        self._at_s, self._before = self.clock(), self._read()

    def line(self) -> str | None:
        """Return the line; None if nothing was computed since the last one and no request waits."""
        now_s, now = self.clock(), self._read()
        seconds, self._at_s = now_s - self._at_s, now_s
        prompt, generated, queried, hit = (now[name] - self._before[name] for name in _COUNTERS)
        running, waiting, usage = (now[name] for name in _GAUGES)
        self._before = now
        if queried:
            self._hit_rate = hit / queried
        if not (prompt or generated or running or waiting):
            return None
        return (
            f"Engine 000: Avg prompt throughput: {prompt / seconds:.1f} tokens/s, "
            f"Avg generation throughput: {generated / seconds:.1f} tokens/s, "
            f"Running: {running:.0f} reqs, Waiting: {waiting:.0f} reqs, "
            f"GPU KV cache usage: {100 * usage:.1f}%, Prefix cache hit rate: {100 * self._hit_rate:.1f}%"
        )

    def _read(self) -> Mapping[str, float]:
        some = self.registry.restricted_registry([*_COUNTERS, *_GAUGES])
        return {sample.name: sample.value for metric in some.collect() for sample in metric.samples}


def register(app: QuartTrio, background: Background, registry: CollectorRegistry, interval_s: float) -> None:
    """Log every `interval_s` seconds while the app serves; 0 never."""

    async def run() -> None:
        stats = StatsLog(registry, trio.current_time)
        while True:
            await trio.sleep(interval_s)
            if (line := stats.line()) is not None:
                logger.info(line)

    if interval_s:
        background.while_serving(app, "stats log", run)
