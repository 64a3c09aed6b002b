"""`trio-llm bench`: that it measures what it says. How fast anything is, no test asserts."""

from __future__ import annotations

import json
from typing import Any

import pytest
import trio
from click.testing import CliRunner

from tests.server.helpers import running
from tests.server.stub import open_stub
from trio_llm.cli.bench import child, offline
from trio_llm.cli.bench.report import Figure, percentile, show
from trio_llm.cli.bench.serve import Load, bench_server
from trio_llm.cli.client import Api
from trio_llm.cli.commands import cli
from trio_llm.config import AuthConfig, Config
from trio_llm.server.app import create_app

LOAD = Load(clients=(1, 3), num_requests=6, repetitions=2, max_tokens=4, prompt_words=12)
UNLIMITED = Config(auth=AuthConfig(rate_limit_requests=0))


async def test_every_request_is_sent_and_counted(capfd: pytest.CaptureFixture[str]) -> None:
    """Each client count sees each repetition, of so many requests of so many tokens, after one to warm up."""
    async with open_stub() as engine, running(create_app(engine, UNLIMITED)) as server:
        rows = await bench_server(Api(f"http://127.0.0.1:{server.port}"), LOAD, None, progress=True)
        await engine.render_metrics()
        labels = {"model_name": "models/stub", "engine": "0"}
        generated = engine.registry.get_sample_value("vllm:generation_tokens_total", labels)
        hits = engine.registry.get_sample_value("vllm:prefix_cache_hits_total", labels)
    assert generated == (1 + 2 * 2) * 6 * 4
    assert hits == 0  # No prompt helps another one.
    assert "30/30" in capfd.readouterr().err
    assert [settings for settings, _ in rows] == [{"clients": 1}, {"clients": 3}]
    for _, figures in rows:
        named = {figure.name: figure for figure in figures}
        assert set(named) == {"throughput", "TTFT p50", "TTFT p99", "ITL p50", "ITL p99", "batch", "engine"}
        assert all(len(figure.values) == 2 for figure in figures)
    alone = {figure.name: figure for figure in rows[0][1]}
    assert alone["batch"].median == pytest.approx(1, abs=0.4)


async def test_prompts_differ_from_their_first_word() -> None:
    """No two prompts begin alike, however short they are."""
    prompts = [LOAD.prompt(number) for number in range(100)]
    assert len({prompt.split()[0] for prompt in prompts}) == 100
    assert {len(prompt.split()) for prompt in prompts} == {12}


def test_json_holds_every_value(capsys: pytest.CaptureFixture[str]) -> None:
    """--json tells settings, unit, median, range and the value of each repetition; the table median and range."""
    rows: Any = [({"clients": 2}, [Figure("speed", "m/s", (3.0, 1.0, 2.0))])]
    show("x", rows, as_json=True)
    told = json.loads(capsys.readouterr().out)["rows"]
    figure = {"unit": "m/s", "median": 2.0, "min": 1.0, "max": 3.0, "values": [3.0, 1.0, 2.0]}
    assert told == [{"clients": 2, "figures": {"speed": figure}}]
    show("x", rows, as_json=False)
    assert "| 2 | 2.0 (1.0-3.0) |" in capsys.readouterr().out
    assert percentile(range(100), 0.99) == 99
    assert percentile([1, 2, 3], 0.5) == 2


def test_flags_for_a_server_that_is_there_are_refused() -> None:
    """Flags can only be given to a server that the benchmark starts."""
    result = CliRunner().invoke(cli, ["bench", "serve", "--base-url", "http://localhost:1", "--", "--port", "1"])
    assert result.exit_code == 2
    assert "leave out --base-url" in result.output


@pytest.mark.slow
def test_the_offline_benchmarks_run_the_demo_model() -> None:
    """One batch and many requests are measured on the real engine; rates are counts over the same seconds."""
    shape = {"input_tokens": 4, "output_tokens": 3, "repetitions": 1}
    (_, [batch, per_token]) = offline.latency({}, batch_size=2, **shape)[0]
    assert per_token.median == pytest.approx(1e3 * batch.median / 3)
    (_, rates) = offline.throughput({}, num_requests=2, **shape)[0]
    requests, output, both = (figure.median for figure in rates)
    assert (output, both) == (pytest.approx(3 * requests), pytest.approx(7 * requests))


async def test_a_server_that_does_not_start_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    """A server that ends at once is no endless wait: its own words are shown."""
    with pytest.raises(child.BenchmarkError, match="did not start"):
        with trio.fail_after(100), child.serving(["--kv-blocks", "0"]) as started:
            await started.listening()
    assert "engine.num_kv_blocks" in capfd.readouterr().err
