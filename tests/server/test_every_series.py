"""Every sample of /metrics moves: one busy day of a server leaves none at the value that it began with."""

from __future__ import annotations

import mmap
import re
import tempfile
from typing import Any

import attrs
import pytest
from prometheus_client.parser import text_string_to_metric_families
from trio.testing import MockClock

from tests.server.helpers import ask
from tests.server.stub import LETTERS, StubRunner, open_stub
from trio_llm.config import AuthConfig, Config
from trio_llm.engine import Engine
from trio_llm.engine.messages import Rejected
from trio_llm.errors import DrainingError, OverloadedError, RequestFailedError
from trio_llm.messages import CORRUPTED, StepPlan, StepResult
from trio_llm.params import PoolingParams, RepetitionDetection, SamplingParams, Submission
from trio_llm.server.app import create_app

JSON = {"content-type": "application/json"}
BROKEN, CORRUPT = 250, 251
# What does not happen, but is: each tells by its labels, or of the process from its start to its end.
CONSTANT = {
    "vllm:cache_config_info",
    "trio_llm:stored_weight_bytes",
    "trio_llm:kept_weight_bytes",
    "trio_llm_auth_enabled",
    "process_start_time_seconds",
    "process_max_fds",
}

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


class BusyRunner(StubRunner):
    """A sparse model on a GPU that breaks on one token, is not finite on another, and takes its time while `slow`."""

    def __init__(self, clock: MockClock) -> None:
        super().__init__()
        self.info = attrs.evolve(self.info, num_kv_blocks=12, stored_formats={"Q4_0": 1000}, kept_formats={"Q4_0": 900})
        self._clock = clock
        self.slow = True

    def step(self, plan: StepPlan) -> StepResult:
        if BROKEN in plan.token_ids:
            raise ZeroDivisionError
        if self.slow:
            self._clock.jump(0.25)
        tokens = sum(plan.counts)
        ids = iter(plan.token_ids)
        rows = [[next(ids) for _ in range(count)] for count in plan.counts]
        return attrs.evolve(
            super().step(plan),
            failed={i: CORRUPTED for i, row in zip(plan.request_ids, rows, strict=True) if CORRUPT in row},
            seconds=0.25 if self.slow else 1e-6,
            expert_tokens=(tokens, tokens),
            kernel_calls=(("linear", "cuda", "", 2),),
        )


def parse(page: str) -> Samples:
    """Return every sample of a page."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


async def scrape(app: Any) -> Samples:
    """Scrape over HTTP."""
    return parse((await ask(app, "GET", "/metrics")).body.decode())


async def finish(engine: Engine, prompt: list[int], **params: Any) -> None:
    """Read a request to its end."""
    async with engine.open_stream(Submission(prompt, SamplingParams(temperature=0, **params))) as stream:
        await stream.collect()


async def crowd(engine: Engine) -> Samples:
    """Ask for more than there is room for; return what is seen in the act."""
    params = SamplingParams(seed=1, max_tokens=40)
    prompts = [list(range(3 + i, 23 + i)) for i in range(4)]
    streams = [engine.open_stream(Submission(prompt, params)) for prompt in [*prompts, *prompts[:3]]]
    streams.append(engine.open_stream(Submission(prompts[2], params, leader=streams[-1].request_id)))
    with pytest.raises(OverloadedError):
        engine.open_stream(Submission([3], SamplingParams()))
    await streams[0].__anext__()
    # At once, where a scrape over HTTP lets the engine go on meanwhile.
    engine._metrics.catch_up()
    during = parse(engine._metrics.render().decode())
    for stream in streams:
        await stream.collect()
    return during


async def every_end(engine: Engine) -> None:
    """Let requests end in every way there is."""
    for token in (BROKEN, CORRUPT):
        with pytest.raises(RequestFailedError):
            await finish(engine, [token])
    letters = tuple(engine.tokenizer.decode([letter]) for letter in LETTERS[:4])
    await finish(engine, [3, 4], max_tokens=200, stop=letters)
    await finish(
        engine, [3, 5], max_tokens=400, repetition_detection=RepetitionDetection(max_pattern_size=1, min_count=2)
    )
    await finish(engine, [3], max_tokens=1)
    async with engine.open_stream(Submission([3, 4, 5], SamplingParams(max_tokens=40))) as left:
        await left.__anext__()
    await engine.embed(Submission([3, 4, 5], PoolingParams()))


async def test_every_sample_moves(mock_clock: MockClock) -> None:
    """No series, no label and no bucket is exported that this server cannot move; what is constant is named here."""
    runner = BusyRunner(mock_clock)
    async with open_stub(runner, max_batch_size=4, max_waiting_batches=1) as engine:
        app = create_app(engine, Config())
        before = await scrape(app)
        during = await crowd(engine)
        for runner.slow in (True, False):
            body = {"prompt": [3], "max_tokens": 3, "ignore_eos": True}
            assert (await ask(app, "POST", "/v1/completions", body, headers=JSON)).status == 200
        await every_end(engine)
        for task in ("batches", "expiry", "stats log"):
            with app.services.background.contained(task):
                raise ZeroDivisionError
        # Memory of the heap may be there already, and threads that end give back regions of exactly 64 MiB.
        ballast = mmap.mmap(-1, 321 * 1024 * 1024)
        ballast[:: mmap.PAGESIZE] = b"x" * (321 * 1024 * 1024 // mmap.PAGESIZE)
        engine.drain()
        with pytest.raises(DrainingError):
            engine.open_stream(Submission([3], SamplingParams()))
        for _ in range(2000):
            engine._metrics.report(Rejected("draining"))
        with tempfile.TemporaryFile():
            after = await scrape(app)
        ballast.close()
    still = {key for key, value in after.items() if value == during.get(key, value) == before.get(key, 0.0)}
    assert {name for name, _ in still} == CONSTANT
    assert after.keys() >= before.keys()


async def test_families_are_all_seen(mock_clock: MockClock) -> None:
    """The walk above leaves no family out: each that the page names has samples, and none is a time of creation."""
    async with open_stub(BusyRunner(mock_clock), max_batch_size=4, max_waiting_batches=1) as engine:
        app = create_app(engine, Config())
        await every_end(engine)
        await ask(app, "POST", "/v1/completions", {"prompt": "a", "max_tokens": 1}, headers=JSON)
        page = (await ask(app, "GET", "/metrics")).body.decode()
    families = set(re.findall(r"^# TYPE (\S+)", page, re.MULTILINE))
    lines = re.findall(r"^(\w[\w:]*)[{ ]", page, re.MULTILINE)
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in lines} == families
    assert not [name for name in lines if name.endswith("_created")]


async def test_the_cache_tells_how_it_is_set_up(mock_clock: MockClock) -> None:
    """The info series has its labels, and the gauge of keys says whether there are any."""
    async with open_stub(BusyRunner(mock_clock), kv_quantization=True) as engine:
        open_to_all = await scrape(create_app(engine, Config()))
        app = create_app(engine, Config(auth=AuthConfig(api_keys=("sk-0123456789abcdef",))))
        keyed = await scrape(app)
    (labels,) = [set(labels) for name, labels in keyed if name == "vllm:cache_config_info"]
    assert {("block_size", "16"), ("num_gpu_blocks", "12"), ("cache_dtype", "int8")} <= labels
    none: frozenset[tuple[str, str]] = frozenset()
    assert (open_to_all["trio_llm_auth_enabled", none], keyed["trio_llm_auth_enabled", none]) == (0, 1)


async def test_metrics_are_told_to_the_end() -> None:
    """A server that drains, and one whose engine has stopped, still tell what happened."""
    async with open_stub(StubRunner()) as engine:
        app = create_app(engine, Config())
        await ask(app, "POST", "/v1/completions", {"prompt": "a", "max_tokens": 2}, headers=JSON)
        engine.drain()
        refused = await ask(app, "POST", "/v1/completions", {"prompt": "a"}, headers=JSON)
        draining = await scrape(app)
    gone = await scrape(app)
    assert refused.status == 503
    for samples in (draining, gone):
        values = {name: value for (name, labels), value in samples.items() if ("reason", "overloaded") not in labels}
        assert values["vllm:generation_tokens_total"] == 2
        assert values["vllm:admission_rejections_total"] == 1
