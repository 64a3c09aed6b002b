"""The files under deploy/ fit what the server exports, and vLLM's published boards find what they draw."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.server.helpers import ask
from tests.server.stub import open_stub
from trio_llm.config import Config
from trio_llm.server.app import create_app

DEPLOY = Path(__file__).parents[1] / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana/dashboard.json").read_text(encoding="utf-8"))
SCRAPING: Any = yaml.safe_load((DEPLOY / "prometheus.yml").read_text(encoding="utf-8"))

# What vLLM's examples/observability/prometheus_grafana/grafana.json and dashboards/grafana/*.json query (0.33.0).
VLLM_BOARDS = """
vllm:e2e_request_latency_seconds_bucket vllm:e2e_request_latency_seconds_sum vllm:e2e_request_latency_seconds_count
vllm:generation_tokens_total vllm:prompt_tokens_total vllm:inter_token_latency_seconds_bucket
vllm:inter_token_latency_seconds_sum vllm:inter_token_latency_seconds_count vllm:kv_cache_usage_perc
vllm:num_requests_running vllm:num_requests_waiting vllm:request_decode_time_seconds_sum
vllm:request_prefill_time_seconds_sum vllm:request_queue_time_seconds_sum vllm:request_generation_tokens_bucket
vllm:request_max_num_generation_tokens_sum vllm:request_prompt_tokens_bucket vllm:request_success_total
vllm:request_time_per_output_token_seconds_bucket vllm:request_time_per_output_token_seconds_sum
vllm:request_time_per_output_token_seconds_count vllm:time_to_first_token_seconds_bucket
vllm:time_to_first_token_seconds_sum vllm:time_to_first_token_seconds_count vllm:iteration_tokens_total_count
""".split()


@pytest.fixture
async def exported() -> dict[str, set[str]]:
    """Return the labels of every sample that a server exports after one completion and one refusal."""
    async with open_stub() as engine:
        app = create_app(engine, Config())
        headers = {"content-type": "application/json"}
        await ask(app, "POST", "/v1/completions", {"prompt": "a", "max_tokens": 3}, headers=headers)
        await ask(app, "GET", "/nowhere")
        page = (await ask(app, "GET", "/metrics")).body.decode()
    samples: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            samples.setdefault(sample.name, set()).update(sample.labels)
    return samples


def queries() -> Iterator[str]:
    """Yield every query of the dashboard, those of its variables too."""
    for panel in DASHBOARD["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))
    yield from (variable["definition"] for variable in DASHBOARD["templating"]["list"] if "definition" in variable)


async def test_every_series_of_the_dashboard_is_exported(exported: dict[str, set[str]]) -> None:
    """No panel is empty for want of its series: each name and each label in it comes out of /metrics."""
    found = 0
    for query in queries():
        names = re.findall(r"\b(?:vllm:|trio_llm:|http_|process_)\w+", query)
        assert names, query
        found += len(names)
        for name in names:
            assert name in exported, query
            for label in re.findall(r"(\w+)=~?\"", query):
                assert label in exported[name], query
    assert found > 40


@pytest.mark.parametrize("name", VLLM_BOARDS)
async def test_vllms_boards_find_their_series(exported: dict[str, set[str]], name: str) -> None:
    """The series that vLLM's published boards draw are there, with the label they filter by."""
    assert "model_name" in exported[name]


def test_panels_do_not_overlap() -> None:
    """Each panel has a place of its own on the grid and says what it shows."""
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert taken.isdisjoint(cells)
        assert at["x"] + at["w"] <= 24
        taken |= cells
        assert panel["type"] == "row" or panel["description"]
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


async def test_prometheus_is_sent_to_the_metrics() -> None:
    """prometheus.yml scrapes the port and the path that the server has by default."""
    (job,) = SCRAPING["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"localhost:{Config().server.port}"]}]
    async with open_stub() as engine:
        assert (await ask(create_app(engine, Config()), "GET", job["metrics_path"])).status == 200
