"""What `trio-llm plan` says: the engine's own numbers, and as many users as it promises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs
import pytest

from tests.model_runner.test_load import CONFIG
from trio_llm.config import EngineConfig
from trio_llm.core.block_math import longest_sequence
from trio_llm.errors import ConfigError
from trio_llm.model.capacity import Choice, Demand, choices
from trio_llm.model.load import load_runner
from trio_llm.model.loading import loader

GIB = 2**30
HYBRID = {
    **CONFIG,
    "architectures": ["MistralForCausalLM"],
    "sliding_window": 32,
    "eos_token_id": 2,
}


@pytest.fixture
def engine(tmp_path: Path, request: pytest.FixtureRequest) -> EngineConfig:
    """Return settings for a model of random weights, no larger than a config.json."""
    config = getattr(request, "param", CONFIG)
    (tmp_path / "config.json").write_text(json.dumps(config))
    return EngineConfig(model=str(tmp_path), load_format="dummy", max_num_batched_tokens=64)


def started(engine: EngineConfig, demand: Demand, choice: Choice) -> EngineConfig:
    """Return the settings of a server of a choice."""
    return attrs.evolve(
        engine,
        **choice.settings,
        max_model_len=demand.context,
        max_batch_size=choice.users,
        num_kv_blocks=choice.budget.num_kv_blocks,
    )


@pytest.mark.parametrize("engine", [CONFIG, HYBRID], indirect=True)
def test_the_engine_takes_what_the_plan_says(engine: EngineConfig) -> None:
    """A server that starts with a choice has its table of memory, byte for byte, and blocks for all its users."""
    demand = Demand(users=5, context=100)
    found = choices(engine, demand)
    assert [sorted(choice.settings) for choice in found] == [
        [], ["kv_quantization"], ["quantization"], ["kv_quantization", "quantization"],
    ]  # fmt: skip
    assert len({choice.budget.total_bytes for choice in found}) == 4
    for choice in found:
        assert (choice.devices, choice.users) == (1, 5)
        config = started(engine, demand, choice)
        runner = load_runner(config)
        available = runner.budget.available_bytes
        assert attrs.evolve(choice.budget, available_bytes=available) == runner.budget
        flight = config.decided(on_gpu=False).max_tokens_in_flight
        assert longest_sequence((runner.info.num_kv_blocks - 1) // 5, runner.info.kv_groups, flight) >= 100
        runner.close()


def test_a_choice_changes_something(engine: EngineConfig) -> None:
    """Where keys and values have 8 bits already, no choice stores them in 8 bits."""
    for dtype in ("int8", "fp8", "fp8_e4m3"):
        found = choices(attrs.evolve(engine, kv_cache_dtype=dtype), Demand(users=5, context=100))
        assert [sorted(choice.settings) for choice in found] == [[], ["quantization"]]


def test_no_weight_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan takes headers only, and counts all that the files have."""
    monkeypatch.setattr(loader, "FileSource", lambda *args: pytest.fail("a file of weights is opened"))
    config = EngineConfig()
    (choice, *_) = choices(config, Demand(users=1, context=10))
    assert choice.budget.weight_bytes == sum(loader.inspect_model(config).stored_formats.values())


def test_more_users_than_a_device_holds_take_more_devices(engine: EngineConfig) -> None:
    """Each device has a replica. One byte less than its users need is one device more."""
    (one, *_) = choices(engine, Demand(users=12, context=100))
    for users in (12, 6, 4):
        (exact, *_) = choices(engine, Demand(users=users, context=100))
        needed = exact.budget.total_bytes
        (fits, *_) = choices(engine, Demand(users=12, context=100, device_bytes=needed))
        (short, *_) = choices(engine, Demand(users=12, context=100, device_bytes=needed - 1))
        assert (fits.devices, fits.users) == (12 // users, users)
        assert short.devices > fits.devices
        assert short.budget.total_bytes < needed
    assert one.devices == 1


def test_a_step_has_room_for_a_token_of_each_user(engine: EngineConfig) -> None:
    """A device has at most as many users as a step has tokens."""
    (choice, *_) = choices(engine, Demand(users=65, context=10))
    assert (choice.devices, choice.users) == (2, 33)


def test_a_rate_needs_bandwidth(engine: EngineConfig) -> None:
    """With a bandwidth, the rate bounds the users of a device; without, it is only reported what it takes."""
    (alone, *_) = choices(engine, Demand(users=4, context=100, rate=10))
    assert (alone.devices, alone.rate_bound) == (1, None)
    assert alone.step_bytes == alone.budget.weight_bytes + 4 * sum(alone.budget.sequence_bytes)
    bandwidth = 10.0 * alone.step_bytes
    (enough, *_) = choices(engine, Demand(users=4, context=100, rate=10, bandwidth=bandwidth))
    (faster, *_) = choices(engine, Demand(users=4, context=100, rate=11, bandwidth=bandwidth))
    assert (enough.devices, enough.rate_bound) == (1, 10.0)
    assert faster.devices > 1
    assert faster.rate_bound is not None and faster.rate_bound >= 11


def test_a_gpu_is_planned_for_without_one(engine: EngineConfig) -> None:
    """With its memory given, no GPU is needed: part of it is usable, and no threads compute."""
    config = attrs.evolve(engine, device="cuda", gpu_memory_utilization=0.5)
    (choice, *_) = choices(config, Demand(users=2, context=50, device_bytes=GIB))
    assert (choice.budget.available_bytes, choice.threads) == (GIB // 2, None)


def test_each_rank_of_a_replica_is_a_gpu(engine: EngineConfig) -> None:
    """Two ranks on GPUs are two devices a replica, each with its part; on a CPU they share the one."""
    on_gpus, on_cpu = (attrs.evolve(engine, device=device, tensor_parallel_size=2) for device in ("cuda", "cpu"))
    first = choices(on_gpus, Demand(users=2, context=64, device_bytes=GIB))[0]
    assert (first.devices, first.users, first.budget.ranks) == (2, 2, 2)
    assert choices(on_cpu, Demand(users=2, context=64, device_bytes=GIB))[0].devices == 1


@pytest.mark.parametrize(
    ("demand", "key", "says"),
    [
        ({"users": 1, "context": 257}, "context", "at most 256"),
        ({"users": 1, "context": 100, "device_bytes": 1000}, "model", "do not fit in the 0.00 GiB available"),
        ({"users": 1, "context": 100, "rate": 1e6, "bandwidth": 1e6}, "rate", "a step of one user reads"),
    ],
)
def test_what_cannot_be_met_is_refused_by_name(
    engine: EngineConfig, demand: dict[str, Any], key: str, says: str
) -> None:
    """The error names what was asked and how much would be possible."""
    with pytest.raises(ConfigError, match=says) as refusal:
        choices(engine, Demand(**demand))
    assert refusal.value.key == key
