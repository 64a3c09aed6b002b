"""What routers rely on: the metrics that an endpoint picker scrapes, several names, limits that let a router through.

The metrics are held to the model server protocol of the Gateway API inference extension (proposal 003), which llm-d's
picker reads too, and not to what this server says of itself.
"""

from __future__ import annotations

from typing import Any

import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families
from trio.testing import wait_all_tasks_blocked

from tests.server.helpers import ask, exchange
from tests.server.stub import GatedWorker, StubRunner, open_stub
from trio_llm.config import AuthConfig, Config, LimitsConfig, ServerConfig
from trio_llm.server.app import ServerApp, create_app

ROUTER = ("10.1.2.3", 4321)
COMPLETION = {"prompt": "a", "max_tokens": 3, "ignore_eos": True}


async def picked(app: ServerApp) -> dict[str, float]:
    """Read /metrics as an endpoint picker does: one gauge per number, and whole numbers as labels of an info series."""
    page = await ask(app, "GET", "/metrics")
    assert page.headers["content-type"].startswith("text/plain; version=")
    families = {family.name: family for family in text_string_to_metric_families(page.body.decode())}
    found: dict[str, float] = {}
    for name in ("num_requests_waiting", "num_requests_running", "kv_cache_usage_perc"):
        (sample,) = families[f"vllm:{name}"].samples
        assert families[f"vllm:{name}"].type == "gauge"
        assert sample.labels == {"model_name": StubRunner().info.name, "engine": "0"}
        found[name] = sample.value
    (info,) = families["vllm:cache_config_info"].samples
    assert (families["vllm:cache_config_info"].type, info.value) == ("gauge", 1)
    found |= {label: int(info.labels[label]) for label in ("block_size", "num_gpu_blocks")}
    # There are no adapters here; a picker goes without the series, as with a vLLM that has none.
    assert "vllm:lora_requests_info" not in families
    return found


async def test_an_endpoint_picker_reads_the_load() -> None:
    """Queue, running requests and use of the cache rise and fall; block size and number of blocks are whole numbers."""
    worker, runner = GatedWorker(), StubRunner()
    async with open_stub(runner, worker=worker, max_batch_size=2) as engine, trio.open_nursery() as nursery:
        app = create_app(engine, Config())
        sizes = {"block_size": runner.info.kv_groups[0].block_size, "num_gpu_blocks": runner.info.num_kv_blocks}
        idle = {"num_requests_waiting": 0, "num_requests_running": 0, "kv_cache_usage_perc": 0, **sizes}
        assert await picked(app) == idle
        for _ in range(3):
            nursery.start_soon(ask, app, "POST", "/v1/completions", COMPLETION)
        await wait_all_tasks_blocked()
        worker.let(1)
        await wait_all_tasks_blocked()
        busy = await picked(app)
        assert (busy["num_requests_running"], busy["num_requests_waiting"]) == (2, 1)
        assert busy["kv_cache_usage_perc"] == pytest.approx(2 / (sizes["num_gpu_blocks"] - 1))
        worker.let(100)
        await wait_all_tasks_blocked()
        assert await picked(app) == idle


async def test_every_name_of_a_model_is_served() -> None:
    """A pool may know a model by several names: each is listed and answered under, and another one is not."""
    config = Config(server=ServerConfig(served_model_name=("base", "alias")))
    async with open_stub() as engine:
        app = create_app(engine, config)
        listed = (await ask(app, "GET", "/v1/models")).json()["data"]
        assert [(model["id"], model["root"]) for model in listed] == [("base", "base"), ("alias", "base")]
        for path in ("/v1/completions", "/v1/completions/render"):
            for name, status in (("base", 200), ("alias", 200), ("stub", 404)):
                answer = await ask(app, "POST", path, {**COMPLETION, "model": name})
                assert answer.status == status
                one: Any = answer.json()
                assert status == 404 or (one[0] if isinstance(one, list) else one)["model"] == name


async def test_a_router_is_not_throttled_with_these_settings() -> None:
    """One peer sends everything: by default it is a client like any other, with the settings of docs/routers.md not."""
    limits = LimitsConfig(max_caller_share=1)
    for config, statuses in (
        (Config(), {200, 429}),
        (Config(auth=AuthConfig(rate_limit_requests=0), limits=limits), {200}),
        (Config(server=ServerConfig(trusted_proxies=("10.0.0.0/8",))), {200}),
    ):
        async with open_stub(max_batch_size=2, max_waiting_batches=1) as engine:
            app = create_app(engine, config, clock=lambda: 0.0)
            seen = {
                (await ask(app, "POST", "/tokenize", {"prompt": "a"}, client=ROUTER, headers=sent)).status
                for sent in [{"x-forwarded-for": f"198.51.100.{number}"} for number in range(101)]
            }
            assert seen == statuses


@pytest.mark.parametrize(("share", "status"), [(0.5, 429), (1.0, 200)])
async def test_a_router_may_have_all_places(share: float, status: int) -> None:
    """With --max-caller-share 1, one peer fills the engine; by default half of it is kept for others."""
    config = Config(limits=LimitsConfig(max_caller_share=share))
    worker = GatedWorker()
    async with open_stub(worker=worker, max_batch_size=2, max_waiting_batches=1) as engine:
        app = create_app(engine, config)
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                call = exchange(app, "POST", "/v1/completions", b'{"prompt": "a", "max_tokens": 1}', client=ROUTER)
                nursery.start_soon(call.run)
            await wait_all_tasks_blocked()
            worker.open = True
            worker.let(1)
            assert (await ask(app, "POST", "/v1/completions", COMPLETION, client=ROUTER)).status == status
            nursery.cancel_scope.cancel()
