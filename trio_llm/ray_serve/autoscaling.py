"""How many replicas there should be, from what the engines say of their queues. Ray's controller calls this."""

from __future__ import annotations

from typing import Any

LOAD = "trio_llm_requests"
"""Name of a replica's metric: sequences that run and wait in its engine."""


def engine_queue_policy(context: Any) -> tuple[float, dict[str, Any]]:
    """Return the number of replicas with which each has its target of sequences. Ray applies delays and bounds.

    Unlike Ray's own policy it counts what the engines compute: a request for several samples is several sequences, and
    a probe is none. Requests that wait in Ray's proxies are added.

    Args:
        context: Ray's `AutoscalingContext`; its means are over the time in which scaling up is delayed.
    """
    in_engines = context.aggregated_metrics.get(LOAD, {}) if context.aggregated_metrics else {}
    waiting = context.total_queued_requests or 0.0
    return (sum(in_engines.values()) + waiting) / context.config.target_ongoing_requests, {}
