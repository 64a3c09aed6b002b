"""HTTP metrics under the names of prometheus-fastapi-instrumentator, which vLLM exports."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

_DURATION_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
# Asked for by monitors all the time; the same ones that vLLM does not count.
_NOT_COUNTED = frozenset({"/metrics", "/health", "/ready", "/load", "/ping", "/version"})
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class HttpMetrics:
    """The series of one app, in its own registry."""

    def __init__(self, *, auth_enabled: bool) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        Gauge("trio_llm_auth_enabled", "1 if an API key is required.", registry=self.registry).set(auth_enabled)
        labels = ["handler", "method"]
        self._requests = Counter(
            "http_requests", "HTTP requests by status.", [*labels, "status"], registry=self.registry
        )
        self._duration = Histogram(
            "http_request_duration_seconds",
            "Time from the end of the headers to the end of the response, including streams.",
            labels,
            buckets=_DURATION_S,
            registry=self.registry,
        )

    def answered(self, rule: str | None, method: str, status: int) -> tuple[str, str]:
        """Count a response and return its labels, for `ended`.

        Labels come from fixed sets, so that invented methods and paths make no new series.
        """
        labels = ("unmatched" if rule is None else rule, method if method in _METHODS else "other")
        if rule not in _NOT_COUNTED:
            self._requests.labels(*labels, str(status)).inc()
        return labels

    def ended(self, labels: tuple[str, str], seconds: float) -> None:
        """Observe a response after its last byte or the client's disconnect."""
        if labels[0] not in _NOT_COUNTED:
            self._duration.labels(*labels).observe(seconds)
