"""What speculation is worth, under vLLM's names; there are no such series in an engine that does not speculate."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter

from trio_llm.engine.messages import StepReport
from trio_llm.messages import ModelInfo


class SpeculationMetrics:
    """Counts drafts and how many of them were right.

    Args:
        most: Drafts of one sequence in a step; each place among them has a series of its own.
    """

    def __init__(self, registry: CollectorRegistry, info: ModelInfo, most: int) -> None:
        labels = {"model_name": info.name, "engine": "0"}

        def counter(name: str, meaning: str) -> Counter:
            return Counter(f"vllm:spec_decode_{name}", meaning, [*labels], registry=registry).labels(**labels)

        self._drafts = counter("num_drafts", "Drafts that were verified, of one token or more.")
        self._drafted = counter("num_draft_tokens", "Tokens of these.")
        self._accepted = counter("num_accepted_tokens", "Of these tokens, those that the model would have chosen.")
        family = Counter(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "These by their place in the draft.",
            [*labels, "position"],
            registry=registry,
        )
        self._by_place = [family.labels(**labels, position=str(place)) for place in range(most)]

    def record(self, report: StepReport) -> None:
        """Take in a step."""
        drafted, accepted = report.stats.drafted, report.stats.accepted
        self._drafts.inc(drafted[0] if drafted else 0)
        self._drafted.inc(sum(drafted))
        self._accepted.inc(sum(accepted))
        for series, count in zip(self._by_place, accepted, strict=False):
            series.inc(count)
