from __future__ import annotations

from typing import Any

import attrs
import pytest
import trio
from trio.testing import MockClock

from tests.engine.fakes import StubRunner, open_stub
from trio_llm.engine import Engine, open_samples
from trio_llm.engine.messages import Rejected
from trio_llm.engine.metrics import Metrics
from trio_llm.errors import RequestFailedError
from trio_llm.messages import CORRUPTED, StepPlan, StepResult
from trio_llm.model_info import KVGroup
from trio_llm.params import SamplingParams, Submission

LABELS = {"model_name": "stub", "engine": "0"}


def value(engine: Engine, name: str, **labels: str) -> float:
    """Return one of vLLM's series."""
    engine._metrics.catch_up()
    found = engine.registry.get_sample_value(f"vllm:{name}", {**LABELS, **labels})
    assert found is not None, name
    return found


async def finish(engine: Engine, prompt: Any, params: SamplingParams) -> None:
    """Read a request to its end."""
    async with engine.open_stream(Submission(prompt, params)) as stream:
        await stream.collect()


@pytest.mark.parametrize("chunk", [2048, 16])
async def test_exact_sums(chunk: int) -> None:
    """R requests of P prompt and M output tokens, one at a time, give vLLM's exact counts and sums.

    All prompts are the same: from the second on most of it comes from the prefix cache and counts all the same.
    """
    r, p, m = 5, 37, 11
    async with open_stub(max_num_batched_tokens=chunk) as engine:
        for _ in range(r):
            await finish(engine, range(p), SamplingParams(temperature=0, max_tokens=m))
        for name in (
            "time_to_first_token_seconds",
            "e2e_request_latency_seconds",
            "request_queue_time_seconds",
            "request_inference_time_seconds",
            "request_prefill_time_seconds",
            "request_decode_time_seconds",
            "request_num_preemptions",
            "request_time_per_output_token_seconds",
            "request_params_n",
        ):
            assert value(engine, f"{name}_count") == r, name
        assert value(engine, "inter_token_latency_seconds_count") == r * (m - 1)
        assert value(engine, "request_prompt_tokens_sum") == r * p
        assert value(engine, "request_generation_tokens_sum") == r * m
        assert value(engine, "request_max_num_generation_tokens_sum") == r * m
        assert value(engine, "request_params_max_tokens_sum") == r * m
        assert value(engine, "iteration_tokens_total_sum") == r * (p + m)
        # The first prompt takes three chunks of 16, the others find 32 tokens in the cache and take one.
        assert value(engine, "iteration_tokens_total_count") == r * m + (2 if chunk == 16 else 0)
        assert value(engine, "prompt_tokens_total") == r * p
        assert value(engine, "generation_tokens_total") == r * m
        assert value(engine, "request_success_total", finished_reason="length") == r
        assert value(engine, "prefix_cache_queries_total") == r * p
        assert value(engine, "prefix_cache_hits_total") == (r - 1) * 32
        assert value(engine, "prompt_tokens_by_source_total", source="local_cache_hit") == (r - 1) * 32
        assert value(engine, "prompt_tokens_by_source_total", source="local_compute") == r * p - (r - 1) * 32
        assert value(engine, "prompt_tokens_cached_total") == (r - 1) * 32
        assert value(engine, "prompt_tokens_cached_by_source_total", source="device") == (r - 1) * 32
        assert value(engine, "request_prefill_kv_computed_tokens_sum") == r * p - (r - 1) * 32


# What vLLM 0.33.0 declares (v1/metrics/loggers.py) and this engine can move: series, their buckets, their own labels.
SECONDS = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
FIRST_TOKEN = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
    2560,
)
TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
COUNT = (1, 2, 5, 10, 20, 50, 100, 200, 500)
VLLM_HISTOGRAMS = {
    "time_to_first_token_seconds": FIRST_TOKEN,
    "inter_token_latency_seconds": TOKEN,
    "request_time_per_output_token_seconds": TOKEN,
    "e2e_request_latency_seconds": SECONDS,
    "request_queue_time_seconds": SECONDS,
    "request_prefill_time_seconds": SECONDS,
    "request_decode_time_seconds": SECONDS,
    "request_inference_time_seconds": SECONDS,
    "request_prompt_tokens": COUNT,
    "request_generation_tokens": COUNT,
    "request_max_num_generation_tokens": COUNT,
    "request_params_max_tokens": COUNT,
    "request_prefill_kv_computed_tokens": COUNT,
    "request_params_n": (1, 2, 5, 10, 20),
    "request_num_preemptions": (1, 2, 3, 4, 5, 10, 20),
    "iteration_tokens_total": (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384),
}
VLLM_OTHERS = {
    "num_requests_running": {}, "num_requests_waiting": {}, "kv_cache_usage_perc": {},
    "num_requests_waiting_by_reason": {"reason": {"capacity", "deferred"}},
    "prefix_cache_queries_total": {}, "prefix_cache_hits_total": {}, "num_preemptions_total": {},
    "prompt_tokens_total": {}, "generation_tokens_total": {}, "prompt_tokens_cached_total": {},
    "prompt_tokens_by_source_total": {"source": {"local_compute", "local_cache_hit"}},
    "prompt_tokens_cached_by_source_total": {"source": {"device"}},
    "request_success_total": {"finished_reason": {"stop", "length", "repetition", "abort", "error"}},
    "admission_rejections_total": {"reason": {"overloaded", "draining"}},
    "corrupted_requests_total": {},
}  # fmt: skip


def test_vllms_series_are_here_with_their_labels_and_buckets() -> None:
    """Each is there from the start; a query for one of vLLM's buckets finds it, and ours begin below 10 ms."""
    registry = Metrics(StubRunner().info).registry
    for name, bounds in VLLM_HISTOGRAMS.items():
        for bound in bounds:
            labels = {**LABELS, "le": str(float(bound))}
            assert registry.get_sample_value(f"vllm:{name}_bucket", labels) == 0, (name, bound)
    assert registry.get_sample_value("vllm:inter_token_latency_seconds_bucket", {**LABELS, "le": "0.0005"}) == 0
    for name, own in VLLM_OTHERS.items():
        for label, values in own.items() or [("engine", {"0"})]:
            for text in values:
                assert registry.get_sample_value(f"vllm:{name}", {**LABELS, label: text}) == 0, (name, text)


def test_formats_of_weights_are_series() -> None:
    """The bytes of each format that the model's files store are a series, and so is what is kept of them."""
    info = attrs.evolve(StubRunner().info, stored_formats={"Q4_1": 70, "F32": 8}, kept_formats={"Q4_1": 60})
    registry = Metrics(info).registry
    for name, nbytes in info.stored_formats.items():
        assert registry.get_sample_value("trio_llm:stored_weight_bytes", {**LABELS, "format": name}) == nbytes
    assert registry.get_sample_value("trio_llm:kept_weight_bytes", {**LABELS, "format": "Q4_1"}) == 60


async def test_what_is_not_finite_is_counted() -> None:
    """A request whose numbers were not finite is corrupted; one that fails otherwise is not."""

    class Corrupt(StubRunner):
        def step(self, plan: StepPlan) -> StepResult:
            return attrs.evolve(super().step(plan), failed=dict.fromkeys(plan.request_ids, self.why))

    runner = Corrupt()
    async with open_stub(runner) as engine:
        for runner.why in ("The model failed.", CORRUPTED, CORRUPTED):
            with pytest.raises(RequestFailedError):
                await finish(engine, [1, 2], SamplingParams())
        await engine.wait_idle()
        assert value(engine, "corrupted_requests_total") == 2
        assert value(engine, "request_success_total", finished_reason="error") == 3


async def test_times_are_the_clocks(mock_clock: MockClock) -> None:
    """Latencies are differences of Trio's clock: a model that takes 2 s a step gives 2 s to the first token."""
    runner = StubRunner(hook=lambda plan: mock_clock.jump(2))
    # One step at a time: the next one would set the clock before this one's tokens are noted.
    async with open_stub(runner, async_scheduling=False) as engine:
        await finish(engine, [1, 2], SamplingParams(temperature=0, max_tokens=4))
        assert value(engine, "time_to_first_token_seconds_sum") == 2
        assert value(engine, "inter_token_latency_seconds_sum") == 6
        assert value(engine, "request_queue_time_seconds_sum") == 0
        assert value(engine, "request_decode_time_seconds_sum") == 6
        assert value(engine, "request_inference_time_seconds_sum") == 8
        assert value(engine, "e2e_request_latency_seconds_sum") == 8
        assert value(engine, "request_time_per_output_token_seconds_sum") == 2


async def test_samples_count_as_one_request() -> None:
    """N samples of a prompt observe n once, and the longest of them."""
    async with (
        open_stub() as engine,
        open_samples(engine, Submission([1, 2], SamplingParams(seed=1, n=3, max_tokens=5))) as streams,
    ):
        for stream in streams:
            await stream.collect()
        assert (value(engine, "request_params_n_sum"), value(engine, "request_params_n_count")) == (3, 1)
        assert value(engine, "request_max_num_generation_tokens_count") == 1
        assert value(engine, "request_max_num_generation_tokens_sum") == 5


async def test_who_waits_tells_why() -> None:
    """Without a place, sequences wait for capacity; samples are deferred until the first one has the prompt."""
    async with open_stub(max_batch_size=1, max_waiting_batches=9) as engine:
        params = SamplingParams(temperature=0, max_tokens=30)
        first = engine.open_stream(Submission([1, 2], params))
        leader = engine.open_stream(Submission([3, 4], params))
        followers = [engine.open_stream(Submission([3, 4], params, leader=leader.request_id)) for _ in range(3)]
        await first.__anext__()
        assert value(engine, "num_requests_waiting") == 4
        assert value(engine, "num_requests_waiting_by_reason", reason="capacity") == 1
        assert value(engine, "num_requests_waiting_by_reason", reason="deferred") == 3
        for stream in (first, leader, *followers):
            await stream.collect()
        await engine.wait_idle()
        await trio.testing.wait_all_tasks_blocked()
        assert value(engine, "num_requests_waiting_by_reason", reason="deferred") == 0


async def test_an_abort_leaves_the_gauges_at_zero() -> None:
    """After a client left nothing runs or waits, and it is counted as aborted; a stop string counts as "stop"."""
    async with open_stub() as engine:
        async with engine.open_stream(Submission([1, 2], SamplingParams(temperature=0, max_tokens=400))) as stream:
            text = (await stream.__anext__()).text
        await finish(engine, [1, 2], SamplingParams(temperature=0, max_tokens=400, stop=(text,)))
        await engine.wait_idle()
        await engine.render_metrics()
        assert value(engine, "num_requests_running") == value(engine, "num_requests_waiting") == 0
        assert value(engine, "request_success_total", finished_reason="abort") == 1
        assert value(engine, "request_success_total", finished_reason="stop") == 1


class SparseStub(StubRunner):
    """Gives every token to expert 0, and to expert 1 as well."""

    def step(self, plan: StepPlan) -> StepResult:
        tokens = sum(plan.counts)
        return attrs.evolve(super().step(plan), expert_tokens=(tokens, tokens, 0))


async def test_expert_load_is_exported_per_expert() -> None:
    """A sparse model's experts are one series each, which adds up every token computed, retried steps included."""
    runner = SparseStub(hook=lambda plan: 1 / 0 if 1 in plan.request_ids else None)
    async with open_stub(runner, enable_prefix_caching=False) as engine:
        bad = engine.open_stream(Submission([50, 50], SamplingParams(temperature=0)))
        await finish(engine, range(10), SamplingParams(temperature=0, max_tokens=4))
        with pytest.raises(RequestFailedError):
            await bad.collect()
        await finish(engine, range(7), SamplingParams(temperature=0, max_tokens=1))
        await engine.render_metrics()
        tokens = [
            engine.registry.get_sample_value("trio_llm:expert_tokens_total", {**LABELS, "expert": expert})
            for expert in "0123"
        ]
    assert tokens == [20, 20, 0, None]


class GpuStub(StubRunner):
    """Runs one operation on a kernel twice a step, and on the reference while a prompt is computed."""

    def step(self, plan: StepPlan) -> StepResult:
        slow = (("linear", "reference", "24 inputs", 1),) if max(plan.counts) > 1 else ()
        return attrs.evolve(super().step(plan), kernel_calls=(("linear", "cuda", "", 2), *slow))


async def test_what_operations_ran_on_is_exported() -> None:
    """Calls add up by operation, implementation and reason, those of a step's retried halves included."""
    runner = GpuStub(hook=lambda plan: 1 / 0 if 50 in plan.token_ids else None)
    async with open_stub(runner, enable_prefix_caching=False) as engine:
        bad = engine.open_stream(Submission([50, 50], SamplingParams(temperature=0)))
        await finish(engine, range(10), SamplingParams(temperature=0, max_tokens=4))
        with pytest.raises(RequestFailedError):
            await bad.collect()
        await engine.render_metrics()
        calls = {
            labels: engine.registry.get_sample_value(
                "trio_llm:kernel_dispatch_total", {**LABELS, **dict(zip(("op", "impl", "reason"), labels, strict=True))}
            )
            for labels in (("linear", "cuda", ""), ("linear", "reference", "24 inputs"))
        }
    assert list(calls.values()) == [8, 1]


async def test_bytes_are_exported_per_group() -> None:
    """Each KV group's gauge is the bytes of the blocks that sequences own in it, and back at 0 afterwards."""
    seen: list[tuple[float | None, ...]] = []
    engines: list[Engine] = []

    def look(_: object = None) -> None:
        engines[0]._metrics.catch_up()
        name = "trio_llm:kv_cache_used_bytes"
        seen.append(tuple(engines[0].registry.get_sample_value(name, {**LABELS, "group": group}) for group in "01"))

    runner = StubRunner(hook=look)
    groups = (KVGroup((0,), 16), KVGroup((1,), 16, 16))
    runner.info = attrs.evolve(runner.info, kv_groups=groups, block_bytes=100)
    async with open_stub(runner, long_prefill_token_threshold=16) as engine:
        engines.append(engine)
        await finish(engine, [7] * 100, SamplingParams(temperature=0, max_tokens=60))
        await engine.wait_idle()
        await trio.testing.wait_all_tasks_blocked()
        look()
    assert max(full for full, _ in seen if full) == 1000
    assert max(window for _, window in seen if window) <= 300
    assert seen[-1] == (0, 0)


async def test_reports_without_room_are_counted() -> None:
    """Whoever reports never waits: what finds no room is dropped, and the drop is a metric."""
    metrics = Metrics(StubRunner().info, capacity=2)
    for _ in range(5):
        metrics.report(Rejected("draining"))
    metrics.catch_up()
    assert metrics.registry.get_sample_value("trio_llm:dropped_reports_total", LABELS) == 3
    assert metrics.registry.get_sample_value("vllm:admission_rejections_total", {**LABELS, "reason": "draining"}) == 2
