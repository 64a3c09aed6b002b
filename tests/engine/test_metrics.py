from __future__ import annotations

import re
from typing import Any

import attrs
import pytest
import trio
from trio.testing import MockClock

from tests.engine.fakes import StubRunner, open_stub
from trio_llm.engine import Engine, open_samples
from trio_llm.engine.messages import Rejected
from trio_llm.engine.metrics import Metrics
from trio_llm.errors import OverloadedError, RequestFailedError
from trio_llm.messages import KVGroup, PoolingParams, RepetitionDetection, SamplingParams, StepPlan, StepResult

LABELS = {"model_name": "stub", "engine": "0"}


def value(engine: Engine, name: str, **labels: str) -> float:
    """Return one of vLLM's series."""
    engine._metrics.catch_up()
    found = engine.registry.get_sample_value(f"vllm:{name}", {**LABELS, **labels})
    assert found is not None, name
    return found


async def finish(engine: Engine, prompt: Any, params: SamplingParams) -> None:
    """Read a request to its end."""
    async with engine.open_stream(prompt, params) as stream:
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
        assert value(engine, "request_prefill_kv_computed_tokens_sum") == r * p - (r - 1) * 32


async def test_times_are_the_clocks(mock_clock: MockClock) -> None:
    """Latencies are differences of Trio's clock: a model that takes 2 s a step gives 2 s to the first token."""
    runner = StubRunner(hook=lambda plan: mock_clock.jump(2))
    async with open_stub(runner) as engine:
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
        open_samples(engine, [1, 2], SamplingParams(seed=1, n=3, max_tokens=5)) as streams,
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
        first = engine.open_stream([1, 2], params)
        leader = engine.open_stream([3, 4], params)
        followers = [engine.open_stream([3, 4], params, leader=leader.request_id) for _ in range(3)]
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
        async with engine.open_stream([1, 2], SamplingParams(temperature=0, max_tokens=400)) as stream:
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
    runner = SparseStub(hook=lambda plan: 1 / 0 if 50 in plan.token_ids else None)
    async with open_stub(runner, enable_prefix_caching=False) as engine:
        bad = engine.open_stream([50, 50], SamplingParams(temperature=0))
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
        bad = engine.open_stream([50, 50], SamplingParams(temperature=0))
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


async def test_every_series_moves() -> None:
    """No series is exported that this engine cannot move: one busy day of it changes every single one."""
    metric_line = re.compile(r"^([a-z_]+:\w+)(\{.*\})? (\S+)$", re.MULTILINE)

    def scrape(engine: Engine) -> dict[str, float]:
        # At once, where a scrape over HTTP lets the engine go on meanwhile: gauges are to be seen in the act.
        engine._metrics.catch_up()
        lines = metric_line.findall(engine._metrics.render().decode())
        # One number per series: of a histogram its sum or, where time stands still, its count.
        return {
            name + labels: float(number) for name, labels, number in lines if not name.endswith(("_bucket", "_created"))
        }

    runner = StubRunner(num_kv_blocks=12, hook=lambda plan: 1 / 0 if plan.token_ids == (50, 50, 50) else None)
    async with open_stub(runner, max_batch_size=4, max_waiting_batches=1) as engine:
        before = scrape(engine)
        prompts = [tuple(range(i, i + 20)) for i in range(4)]
        params = SamplingParams(seed=1, max_tokens=40)
        streams = [engine.open_stream(prompt, params) for prompt in [*prompts, *prompts[:3]]]
        streams.append(engine.open_stream(prompts[2], params, leader=streams[-1].request_id))
        with pytest.raises(OverloadedError):
            engine.open_stream([1], SamplingParams())
        await streams[0].__anext__()
        during = scrape(engine)
        for stream in streams:
            await stream.collect()
        bad = engine.open_stream([50] * 3, SamplingParams())
        with pytest.raises(RequestFailedError):
            await bad.collect()
        await finish(engine, [2, 3], SamplingParams(seed=1, max_tokens=40, stop=tuple("abcdefghijklmnopqrstuvwxyz")))
        in_circles = RepetitionDetection(max_pattern_size=1, min_count=2)
        await finish(engine, [2, 4], SamplingParams(seed=1, max_tokens=100, repetition_detection=in_circles))
        async with engine.open_stream([1, 2, 3], SamplingParams(max_tokens=40)) as left:
            await left.__anext__()
        await engine.embed([1, 2, 3], PoolingParams())
        engine.drain()
        with pytest.raises(Exception, match="shutting down"):
            engine.open_stream([1], SamplingParams())
        for _ in range(2000):
            engine._metrics.report(Rejected("draining"))
        after = scrape(engine)
    still = {name for name in after if before[name] == during[name] == after[name]}
    # An info series tells by its labels. The stub's model takes no time; the runner's seconds are tested with it.
    info = {name for name in after if name.startswith("vllm:cache_config_info{")}
    assert len(info) == 1
    assert {'block_size="16"', 'num_gpu_blocks="12"', 'cache_dtype="auto"'} <= set(re.split("[{,}]", *info))
    assert still - info == {'trio_llm:step_model_seconds_sum{engine="0",model_name="stub"}'}
