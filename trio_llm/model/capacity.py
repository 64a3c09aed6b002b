"""What a number of users needs of memory, bandwidth and devices, from a model's headers alone.

Every byte comes from the budget that the engine makes at its start: there is no second formula.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator

import attrs

from trio_llm.config import EngineConfig
from trio_llm.errors import ConfigError, UnsupportedError
from trio_llm.model.device.device import Device
from trio_llm.model.load import find_kernels, inspect_for, num_threads, open_device, rank_bytes
from trio_llm.model.loading.draft_model import inspect_draft
from trio_llm.model.loading.loader import ModelPlan, inspect_model
from trio_llm.model.loading.memory_budget import MemoryBudget, add_up, make_budget
from trio_llm.model.ops import cuda
from trio_llm.model.ops.dispatch import mode_from_environment

# Settings that take less memory, and what each costs.
_ALTERNATIVES: tuple[tuple[dict[str, object], str], ...] = (
    ({}, "as asked"),
    ({"kv_quantization": True}, "keys and values of 8 bits"),
    ({"quantization": "int8"}, "weights of 8 bits"),
    ({"kv_quantization": True, "quantization": "int8"}, "weights, keys and values of 8 bits"),
)


@attrs.frozen(kw_only=True)
class Demand:
    """What is asked of a model.

    Attributes:
        users: Sequences that are generated at a time.
        context: Tokens of each, prompt and output.
        rate: Output tokens a second for each; None if that does not matter.
        device_bytes: Memory of a device to plan for; None for this machine's.
        bandwidth: Bytes a second that a device reads from its memory; None if unknown.
    """

    users: int
    context: int
    rate: float | None = None
    device_bytes: int | None = None
    bandwidth: float | None = None


@attrs.frozen(kw_only=True)
class Choice:
    """One way to meet a demand, by replicas of the model, each on its own device or, with ranks, its own GPUs.

    Attributes:
        settings: What is set beyond what was asked.
        cost: What these settings cost, in words.
        devices: How many, of all replicas.
        users: Users of each.
        budget: Memory of each.
        threads: Threads that compute on a CPU; None on a GPU.
        step_bytes: Most bytes that a replica reads in a step: all weights, and the keys and values of all its users.
        rate_bound: Tokens a second for each user that the bandwidth allows at most; None without a bandwidth.
    """

    settings: dict[str, object]
    cost: str
    devices: int
    users: int
    budget: MemoryBudget
    threads: int | None
    step_bytes: int
    rate_bound: float | None


@attrs.frozen(kw_only=True)
class _Inspected:
    """A model on one kind of device, for a demand."""

    config: EngineConfig
    plan: ModelPlan
    draft: ModelPlan | None
    available_bytes: int
    on_gpu: bool

    def budget(self, users: int) -> MemoryBudget:
        config = attrs.evolve(self.config, max_batch_size=users)
        smallest = add_up(self.plan, config, 1, self.available_bytes, self.draft, on_host=not self.on_gpu)
        return attrs.evolve(smallest, num_kv_blocks=smallest.blocks_for(users))


def choices(config: EngineConfig, demand: Demand) -> list[Choice]:
    """Return ways to meet a demand, as asked first; those that cannot are left out.

    Raises:
        ConfigError: No way can; names the setting. The context is longer than the model allows.
        CheckpointError, UnsupportedError: As when the model is loaded.
    """
    found = list(_found(config, demand))
    if not found:
        _refuse(_inspected(config, demand), demand)
    return found


def _found(config: EngineConfig, demand: Demand) -> Iterator[Choice]:
    for settings, cost in _ALTERNATIVES:
        if any(getattr(config, name) for name in settings):
            continue
        if "kv_quantization" in settings and config.kv_cache_dtype != "auto":
            continue  # It would change nothing.
        try:
            inspected = _inspected(attrs.evolve(config, **settings), demand)
        except UnsupportedError:
            if not settings:
                raise
            continue
        if (choice := _choose(inspected, demand, settings, cost)) is not None:
            yield choice


def _inspected(config: EngineConfig, demand: Demand) -> _Inspected:
    config = attrs.evolve(config, max_model_len=demand.context)
    if config.device == "cuda" and demand.device_bytes is not None:
        on_gpu, plan = True, inspect_model(config, as_stored=True, keeps=cuda.keeps)
        available = int(demand.device_bytes * config.gpu_memory_utilization)
    else:
        mode, device = mode_from_environment(), open_device(config)
        on_gpu = device.torch_device.type == "cuda"
        plan = inspect_for(config, device, find_kernels(mode, device, lambda _: None), as_stored=True)
        available = _available(config, device, demand)
    if demand.context > plan.max_model_len:
        allowed = f"at most {plan.max_model_len}, what the model was made for"
        raise ConfigError("context", demand.context, "plan", allowed)
    config = config.decided(on_gpu=on_gpu)
    draft = inspect_draft(config, plan)
    return _Inspected(config=config, plan=plan, draft=draft and draft.plan, available_bytes=available, on_gpu=on_gpu)


def _available(config: EngineConfig, device: Device, demand: Demand) -> int:
    if demand.device_bytes is None:
        return rank_bytes(config, device)
    return demand.device_bytes // config.tensor_parallel_size


def _choose(inspected: _Inspected, demand: Demand, settings: dict[str, object], cost: str) -> Choice | None:
    """Return the choice with the fewest devices; None if a device cannot serve even one user."""
    # A step has room for a token of each user.
    most = min(demand.users, inspected.config.step_tokens)
    fewest_too_many = bisect_left(range(1, most + 1), True, key=lambda users: not _serves(inspected, users, demand)) + 1
    if fewest_too_many == 1:
        return None
    replicas = math.ceil(demand.users / (fewest_too_many - 1))
    users = math.ceil(demand.users / replicas)
    budget = inspected.budget(users)
    step_bytes = _step_bytes(budget, users)
    return Choice(
        settings=settings,
        cost=cost,
        devices=replicas * (inspected.config.tensor_parallel_size if inspected.on_gpu else 1),
        users=users,
        budget=budget,
        threads=None if inspected.on_gpu else num_threads(inspected.config, budget.weight_bytes),
        step_bytes=step_bytes,
        rate_bound=demand.bandwidth and demand.bandwidth / step_bytes,
    )


def _serves(inspected: _Inspected, users: int, demand: Demand) -> bool:
    budget = inspected.budget(users)
    if budget.total_bytes > inspected.available_bytes:
        return False
    return not (demand.rate and demand.bandwidth) or demand.rate * _step_bytes(budget, users) <= demand.bandwidth


def _step_bytes(budget: MemoryBudget, users: int) -> int:
    return budget.weight_bytes + users * sum(budget.sequence_bytes)


def _refuse(inspected: _Inspected, demand: Demand) -> None:
    """Raise why a device cannot serve one user: for its memory, in the words of the engine, else for its bandwidth."""
    alone = inspected.budget(1)
    config = attrs.evolve(inspected.config, max_batch_size=1, num_kv_blocks=alone.num_kv_blocks)
    available, on_host = inspected.available_bytes, not inspected.on_gpu
    make_budget(inspected.plan, config, alone.num_kv_blocks, available, inspected.draft, on_host=on_host)
    needed = _step_bytes(alone, 1)
    assert demand.bandwidth is not None
    allowed = (
        f"at most {demand.bandwidth / needed:.3g}: a step of one user reads {needed / 1e9:.2f} GB, "
        f"and the bandwidth is {demand.bandwidth / 1e9:g} GB/s"
    )
    raise ConfigError("rate", demand.rate, "plan", allowed)
