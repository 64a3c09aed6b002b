"""The metrics actor: turns reports into a Prometheus registry, under vLLM's names so that its dashboards work.

There is no series that this engine cannot change. Reporting never waits: a report that finds the queue full is dropped
and counted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count as count_up

import attrs
import trio
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest

from trio_llm.engine.messages import IdleReport, Rejected, Report, RequestStats, StepReport
from trio_llm.messages import BlockStats
from trio_llm.model_info import ModelInfo

# vLLM's buckets, and finer ones below 10 ms: a step of a small model is faster than vLLM's first bucket.
_FAST_S = (0.0005, 0.001, 0.0025, 0.005, 0.0075)
_LATENCY_S = (
    0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
)  # fmt: skip
_FIRST_TOKEN_S = (
    0.001, 0.0025, 0.005, 0.0075, 0.01, 0.02, 0.04, 0.06, 0.08,
    0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip
_TOKEN_S = (
    *_FAST_S, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
)  # fmt: skip
_OWN_S = (0.0001, 0.00025, *_FAST_S, 0.01, 0.025, 0.05, 0.1, 0.25, 1)
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_REASONS = ("stop", "length", "repetition", "abort", "error")
_REJECTIONS = ("overloaded", "draining")


def _inference_s(request: RequestStats) -> float | None:
    if request.prefill_s is None or request.decode_s is None:
        return None
    return request.prefill_s + request.decode_s


def _per_token_s(request: RequestStats) -> float | None:
    if request.decode_s is None or request.num_generated_tokens < 2:
        return None
    return request.decode_s / (request.num_generated_tokens - 1)


def _computed_tokens(request: RequestStats) -> float | None:
    return None if request.prefill_s is None else request.num_prompt_tokens - request.num_cached_tokens


# Name without prefix, text, buckets (None: tokens up to the longest sequence), value (None: nothing to observe).
_REQUEST_HISTOGRAMS: tuple[tuple[str, str, tuple[float, ...] | None, Callable[[RequestStats], float | None]], ...] = (
    ("e2e_request_latency_seconds", "Time from arrival to the end.", _LATENCY_S, lambda r: r.e2e_s),
    ("request_queue_time_seconds", "Time from arrival to the first step.", _LATENCY_S, lambda r: r.queue_s),
    ("request_prefill_time_seconds", "Time from the first step to the first token.", _LATENCY_S, lambda r: r.prefill_s),
    ("request_decode_time_seconds", "Time from the first to the last token.", _LATENCY_S, lambda r: r.decode_s),
    ("request_inference_time_seconds", "Time from the first step to the last token.", _LATENCY_S, _inference_s),
    ("request_time_per_output_token_seconds", "Mean time per token after the first.", _TOKEN_S, _per_token_s),
    ("request_prompt_tokens", "Prompt tokens of a request.", None, lambda r: r.num_prompt_tokens),
    ("request_generation_tokens", "Generated tokens of a request.", None, lambda r: r.num_generated_tokens),
    (
        "request_max_num_generation_tokens",
        "Generated tokens of a prompt's longest sample.",
        None,
        lambda r: r.siblings_max_tokens,
    ),
    ("request_params_n", "Value of n.", (1, 2, 5, 10, 20), lambda r: r.n),
    ("request_params_max_tokens", "Value of max_tokens, or its default.", None, lambda r: r.max_tokens),
    ("request_num_preemptions", "Preemptions of a request.", (1, 2, 3, 4, 5, 10, 20), lambda r: r.num_preemptions),
    ("request_prefill_kv_computed_tokens", "Prompt tokens that were computed, not cached.", None, _computed_tokens),
)


@attrs.frozen
class _Counted:
    """A registry without `_created` series, which are a third of the page and which no dashboard uses."""

    registry: CollectorRegistry

    def collect(self) -> Iterator[Metric]:
        for metric in self.registry.collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric


def exposition(registry: CollectorRegistry) -> bytes:
    """Return the series of a registry in Prometheus' text format."""
    return generate_latest(_Counted(registry))


class Metrics:
    """The metrics actor. `run` is its task; any task may call `report`.

    Args:
        info: The model; its name is a label of every series.
        cache: Settings of the KV cache under vLLM's names, the labels of `vllm:cache_config_info`.
        capacity: Maximum reports that wait to be recorded.

    Attributes:
        registry: Private to this engine, so that several engines in a process do not mix.
        watchers: Called with every ended request.
        step_watchers: Called with every step, before the requests that ended with it.
    """

    def __init__(self, info: ModelInfo, cache: Mapping[str, object] | None = None, *, capacity: int = 1024) -> None:
        self.registry = CollectorRegistry()
        self.watchers: list[Callable[[RequestStats], None]] = []
        self.step_watchers: list[Callable[[StepReport], None]] = []
        self._labels = {"model_name": info.name, "engine": "0"}
        self._block_bytes = info.block_bytes
        # Not a memory channel: it would hand a message to a waiting receiver, and catch_up would not see it.
        self._reports = deque[Report]()
        self._capacity = capacity
        self._news = trio.lowlevel.ParkingLot()
        self._declare_queue()
        self._declare_steps()
        self._declare_model(info)
        self._declare_requests(info.max_model_len)
        about = {"num_gpu_blocks": info.num_kv_blocks, "block_size": info.kv_groups[0].block_size, **(cache or {})}
        texts = {name: str(value) for name, value in about.items()}
        what = "1; its labels tell how the KV cache is set up."
        Gauge("vllm:cache_config_info", what, [*self._labels, *texts], registry=self.registry).labels(
            **self._labels, **texts
        ).set(1)

    def report(self, report: Report) -> None:
        """Queue a report, or drop and count it."""
        if len(self._reports) == self._capacity:
            self._dropped.inc()
            return
        self._reports.append(report)
        self._news.unpark()

    async def run(self) -> None:
        """Run the metrics actor."""
        while True:
            self.catch_up()
            await self._news.park()

    def catch_up(self) -> None:
        """Record all queued reports."""
        while self._reports:
            self._record(self._reports.popleft())

    def render(self) -> bytes:
        """Return all series in Prometheus text format."""
        return exposition(self.registry)

    def _declare_queue(self) -> None:
        gauge = self._gauge
        self._running = gauge("vllm:num_requests_running", "Sequences that are running.")
        self._waiting = gauge("vllm:num_requests_waiting", "Sequences waiting to be scheduled.")
        by_reason = self._gauges(
            "vllm:num_requests_waiting_by_reason",
            "Waiting sequences: capacity for a place and blocks, deferred for another sample to compute the prompt.",
            "reason",
        )
        self._waiting_for_room, self._held = by_reason("capacity"), by_reason("deferred")
        self._usage = gauge("vllm:kv_cache_usage_perc", "Fraction of the KV cache blocks in use, 0 to 1.")

    def _declare_steps(self) -> None:
        counter, histogram = self._counter, self._histogram
        self._preemptions = counter("vllm:num_preemptions", "Preemptions: sequences that lost their KV blocks.")
        self._queried = counter("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self._hit = counter("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self._prompt = counter("vllm:prompt_tokens", "Prompt tokens prefilled, including cached ones.")
        self._prompt_cached = counter("vllm:prompt_tokens_cached", "Prompt tokens taken from the prefix cache.")
        self._cached_by_source = self._counters(
            "vllm:prompt_tokens_cached_by_source",
            "Cached prompt tokens by the cache they came from.",
            "source",
            ("device",),
        )
        self._prompt_by_source = self._counters(
            "vllm:prompt_tokens_by_source", "Prompt tokens by source.", "source", ("local_compute", "local_cache_hit")
        )
        self._generated = counter("vllm:generation_tokens", "Generated tokens.")
        self._step_tokens = histogram(
            "vllm:iteration_tokens_total", "Prompt and generated tokens in one step.", _STEP_TOKENS
        )
        self._first_token = histogram(
            "vllm:time_to_first_token_seconds", "Time from arrival to the first token.", _FIRST_TOKEN_S
        )
        self._inter_token = histogram("vllm:inter_token_latency_seconds", "Time between two tokens.", _TOKEN_S)
        self._model_s = histogram("trio_llm:step_model_seconds", "Time of a step in model and sampler.", _TOKEN_S)
        self._own_s = histogram("trio_llm:step_own_seconds", "Time of a step outside the model.", _OWN_S)
        self._dropped = counter("trio_llm:dropped_reports", "Reports dropped because the queue of metrics was full.")

    def _declare_model(self, info: ModelInfo) -> None:
        self._expert_tokens = Counter(
            "trio_llm:expert_tokens",
            "Tokens routed to each expert, over all layers.",
            [*self._labels, "expert"],
            registry=self.registry,
        )
        self._by_expert: list[Counter] = []  # one per expert, made with the first step
        self._kernel_calls = Counter(
            "trio_llm:kernel_dispatch",
            "Operations by implementation: cuda or native (own kernels), cublas, torch or reference (slow), and why.",
            [*self._labels, "op", "impl", "reason"],
            registry=self.registry,
        )
        self._by_call: dict[tuple[str, str, str], Counter] = {}
        used = self._gauges("trio_llm:kv_cache_used_bytes", "Bytes of KV cache blocks in use.", "group")
        self._used_bytes = [used(str(group)) for group in range(len(info.kv_groups))]
        what = "Bytes of weights in the model's files, by format."
        stored = self._gauges("trio_llm:stored_weight_bytes", what, "format")
        for name, nbytes in info.stored_formats.items():
            stored(name).set(nbytes)
        what = "Of these, the bytes of weights that are computed as stored, not widened."
        kept = self._gauges("trio_llm:kept_weight_bytes", what, "format")
        for name, nbytes in info.kept_formats.items():
            kept(name).set(nbytes)

    def _declare_requests(self, max_model_len: int) -> None:
        self._success = self._counters("vllm:request_success", "Finished requests.", "finished_reason", _REASONS)
        self._corrupted = self._counter("vllm:corrupted_requests", "Requests whose logits were not finite.")
        self._rejected = self._counters("vllm:admission_rejections", "Refused requests.", "reason", _REJECTIONS)
        tokens = tuple(_one_two_five(max_model_len))
        self._num_planned = self._num_running = 0
        self._by_request = [
            (self._histogram(f"vllm:{name}", what, tokens if buckets is None else buckets), value)
            for name, what, buckets, value in _REQUEST_HISTOGRAMS
        ]

    def count_accepted(self, num_requests: int) -> None:
        """Show accepted requests that the scheduler has not read yet as waiting: it reads between two steps."""
        if num_requests > self._num_planned:
            self._waiting.set(num_requests - self._num_running)

    def _record(self, report: Report) -> None:
        match report:
            case StepReport():
                for watch in self.step_watchers:
                    watch(report)
                self._record_step(report)
                self._record_ended(report.ended)
                stats = report.stats
                self._record_gauges(stats.num_running, stats.num_waiting, stats.num_held, stats.blocks)
            case IdleReport():
                self._record_ended(report.ended)
                self._record_gauges(report.num_running, report.num_waiting, 0, report.blocks)
            case Rejected():
                self._rejected[report.reason].inc()

    def _record_step(self, report: StepReport) -> None:
        stats = report.stats
        self._preemptions.inc(stats.num_preempted)
        self._queried.inc(stats.blocks.queried_tokens)
        self._hit.inc(stats.blocks.hit_tokens)
        self._prompt.inc(report.prompt_tokens)
        self._prompt_cached.inc(report.cached_tokens)
        self._cached_by_source["device"].inc(report.cached_tokens)
        self._prompt_by_source["local_cache_hit"].inc(report.cached_tokens)
        self._prompt_by_source["local_compute"].inc(report.prompt_tokens - report.cached_tokens)
        self._generated.inc(stats.num_generated_tokens)
        # As vLLM counts: cached prompt tokens too, in the step that found them.
        self._step_tokens.observe(stats.num_prefill_tokens + stats.blocks.hit_tokens + stats.num_generated_tokens)
        self._model_s.observe(stats.seconds)
        if stats.expert_tokens is not None:
            self._record_experts(stats.expert_tokens)
        for *kind, calls in stats.kernel_calls or ():
            self._calls_of(*kind).inc(calls)
        if report.own_s is not None:
            self._own_s.observe(report.own_s)
        for seconds in report.first_token_s:
            self._first_token.observe(seconds)
        for seconds in report.inter_token_s:
            self._inter_token.observe(seconds)

    def _calls_of(self, op: str, impl: str, reason: str) -> Counter:
        """Return the counter of a kind of call: to look it up by its labels takes longer than to count."""
        kind = op, impl, reason
        if kind not in self._by_call:
            self._by_call[kind] = self._kernel_calls.labels(**self._labels, op=op, impl=impl, reason=reason)
        return self._by_call[kind]

    def _record_experts(self, tokens: Sequence[int]) -> None:
        for expert in range(len(self._by_expert), len(tokens)):
            self._by_expert.append(self._expert_tokens.labels(**self._labels, expert=str(expert)))
        for counter, count in zip(self._by_expert, tokens, strict=True):
            counter.inc(count)

    def _record_gauges(self, num_running: int, num_waiting: int, num_held: int, blocks: BlockStats | None) -> None:
        self._num_planned = num_running + num_waiting
        self._num_running = num_running
        self._running.set(num_running)
        self._waiting.set(num_waiting)
        self._waiting_for_room.set(num_waiting - num_held)
        self._held.set(num_held)
        if blocks is None:
            return
        self._usage.set(sum(blocks.used_blocks) / blocks.total_blocks)
        for gauge, used in zip(self._used_bytes, blocks.used_blocks, strict=True):
            gauge.set(used * self._block_bytes)

    def _record_ended(self, ended: Iterable[RequestStats]) -> None:
        for request in ended:
            for watch in self.watchers:
                watch(request)
            self._success[request.reason].inc()
            self._corrupted.inc(request.corrupted)
            for histogram, value in self._by_request:
                if (observed := value(request)) is not None:
                    histogram.observe(observed)

    def _gauge(self, name: str, meaning: str) -> Gauge:
        return Gauge(name, meaning, [*self._labels], registry=self.registry).labels(**self._labels)

    def _counter(self, name: str, meaning: str) -> Counter:
        return Counter(name, meaning, [*self._labels], registry=self.registry).labels(**self._labels)

    def _gauges(self, name: str, meaning: str, label: str) -> Callable[[str], Gauge]:
        family = Gauge(name, meaning, [*self._labels, label], registry=self.registry)
        return lambda value: family.labels(**self._labels, **{label: value})

    def _counters(self, name: str, meaning: str, label: str, values: Iterable[str]) -> dict[str, Counter]:
        family = Counter(name, meaning, [*self._labels, label], registry=self.registry)
        return {value: family.labels(**self._labels, **{label: value}) for value in values}

    def _histogram(self, name: str, meaning: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(name, meaning, [*self._labels], registry=self.registry, buckets=buckets).labels(**self._labels)


def _one_two_five(largest: int) -> Iterator[int]:
    for exponent in count_up():
        for digit in (1, 2, 5):
            if (bucket := digit * 10**exponent) > largest:
                return
            yield bucket
