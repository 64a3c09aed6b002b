"""Metrics of speculative decoding, under vLLM's names. They exist only if the engine speculates."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter

from trio_llm.engine.messages import StepReport
from trio_llm.model_info import ModelInfo


class SpeculationMetrics:
    """Counts drafted and accepted tokens.

    Args:
        max_drafts: Maximum draft tokens per sequence and step. Each position has its own series.
    """

    def __init__(self, registry: CollectorRegistry, info: ModelInfo, max_drafts: int) -> None:
        labels = {"model_name": info.name, "engine": "0"}

        def counter(name: str, meaning: str) -> Counter:
            return Counter(f"vllm:spec_decode_{name}", meaning, [*labels], registry=registry).labels(**labels)

        self._drafts = counter("num_drafts", "Verified drafts of at least one token.")
        self._drafted = counter("num_draft_tokens", "Verified draft tokens.")
        self._accepted = counter("num_accepted_tokens", "Accepted draft tokens.")
        family = Counter(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Accepted draft tokens by position in the draft.",
            [*labels, "position"],
            registry=registry,
        )
        self._by_place = [family.labels(**labels, position=str(place)) for place in range(max_drafts)]

    def record(self, report: StepReport) -> None:
        """Record one step."""
        drafted, accepted = report.stats.drafted, report.stats.accepted
        self._drafts.inc(drafted[0] if drafted else 0)
        self._drafted.inc(sum(drafted))
        self._accepted.inc(sum(accepted))
        for series, count in zip(self._by_place, accepted, strict=False):
            series.inc(count)
