"""From settings to a runner: choose the device, check that all fits, read the weights, take the memory."""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from trio_llm.config import EngineConfig
from trio_llm.errors import ConfigError, UnsupportedError
from trio_llm.messages import ModelInfo, Progress
from trio_llm.model.device import Cpu, Device, Gpu
from trio_llm.model.dispatch import Dispatch, dispatching
from trio_llm.model.draft_model import inspect_draft
from trio_llm.model.loader import ModelPlan, inspect_model, load_model
from trio_llm.model.memory import MemoryBudget, available_bytes, control_groups, make_budget
from trio_llm.model.runner import Runner
from trio_llm.model.sizing import size_pool, usable_bytes

_log = logging.getLogger(__name__)

# Weights that stay in a core's cache. A request to the 3 MB demo model took 0.3 s on one thread and 2.5 to 3.8 s on two
# while other programs used the machine (2 cores).
_SMALL_MODEL_BYTES = 16 * 2**20
# KV blocks where nothing is said: of a CPU's pool, and those that no pool can do without.
_DEFAULT_BLOCKS, _LEAST_BLOCKS = 1024, 2
# As torch would have it, before any model of this process changed it.
_DEFAULT_THREADS = torch.get_num_threads()


def load_runner(config: EngineConfig, report: Callable[[Progress], None] | None = None) -> Runner:
    """Load a model and make it ready to run steps.

    Everything that can be refused is refused before weights are read.

    Args:
        report: Told how far reading is.
    Raises:
        CheckpointError: The model's files are damaged or do not fit together.
        UnsupportedError: Something that is not built yet, by name.
        ConfigError: Settings that do not fit the model or the machine; a TRIO_LLM_KERNELS that is no mode.
    """
    dispatch = Dispatch.from_environment()
    device = open_device(config)
    config = config.decided(on_gpu=isinstance(device, Gpu))
    plan = inspect_model(config)
    draft = inspect_draft(config, plan)
    budget = make_budget(plan, config, *_least_pool(config, device), draft and draft.plan)
    info = _info(plan, config, budget, device)
    _limit_threads(plan.weight_bytes)
    for tower, count in plan.skipped.items():
        _log.info("%s: left out %d tensors of %s: only the language model is served", plan.directory.name, count, tower)
    with device.working(), dispatching(dispatch):
        loaded = load_model(config, plan.dtype, device.torch_device, report)
        drafter = draft and draft.load(device.torch_device, report)
        _return_freed_memory()
        if isinstance(device, Gpu):
            budget = size_pool(budget, loaded, config, device)
            info = _info(plan, config, budget, device)
        dispatch.take()  # what loading and measuring called is no step's
        runner = Runner(
            loaded.model,
            loaded.kv_layout,
            info,
            budget,
            max_batch_size=config.max_batch_size,
            device=device,
            dispatch=dispatch,
            draft=drafter,
        )
        if isinstance(device, Gpu) and not config.enforce_eager:
            runner.capture_decodes(device.capture, report or (lambda _: None))
    return runner


def open_device(config: EngineConfig) -> Device:
    """Return the device that the settings name.

    Raises:
        ConfigError: There is none.
        UnsupportedError: More than one is asked for.
    """
    if config.tensor_parallel_size > 1:
        raise UnsupportedError(
            f"--tensor-parallel-size {config.tensor_parallel_size}: running on several devices is not supported yet."
        )
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        return Cpu()
    from trio_llm.model.cuda import open_cuda

    return open_cuda()


def _least_pool(config: EngineConfig, device: Device) -> tuple[int, int]:
    """Return the blocks that there have to be, and the bytes for all. A GPU's pool is sized when steps are measured."""
    if isinstance(device, Gpu):
        return config.num_kv_blocks or _LEAST_BLOCKS, usable_bytes(device, config)
    return config.num_kv_blocks or _DEFAULT_BLOCKS, available_bytes()


def _info(plan: ModelPlan, config: EngineConfig, budget: MemoryBudget, device: Device) -> ModelInfo:
    longest = config.max_model_len or plan.max_model_len
    if longest > plan.max_model_len:
        raise ConfigError(
            "max_model_len", longest, "model", f"at most {plan.max_model_len}, what the model was made for"
        )
    return ModelInfo(
        name=plan.directory.name,
        architecture=plan.architecture,
        vocab_size=plan.config.text.get_int("vocab_size"),
        hidden_size=plan.config.text.get_int("hidden_size"),
        max_model_len=longest,
        eos_token_ids=plan.eos_token_ids,
        kv_groups=plan.kv_layout.groups,
        num_kv_blocks=budget.num_kv_blocks,
        block_bytes=plan.kv_layout.block_bytes,
        dtype=str(plan.dtype).removeprefix("torch."),
        default_sampling=plan.default_sampling,
        on_gpu=isinstance(device, Gpu),
        memory_table=budget.render(),
    )


def _limit_threads(weight_bytes: int) -> None:
    """Use no more threads than the control group has processors, unless OMP_NUM_THREADS says how many.

    torch counts the machine's cores; in a container that may run on four of sixty-four, sixty threads would
    spend their time waiting for one another's turn. A small model's operations are over before a second thread has
    woken up, and where another program wants that core, each of them waits for it: one thread.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return
    if weight_bytes < _SMALL_MODEL_BYTES:
        torch.set_num_threads(1)
        return
    quotas: list[int] = []
    for directory in control_groups(Path("/"), ""):
        limit = directory / "cpu.max"
        quota, period = limit.read_text().split() if limit.is_file() else ("max", "1")
        if quota != "max":
            quotas.append(max(1, int(quota) // int(period)))
    torch.set_num_threads(min(_DEFAULT_THREADS, *quotas) if quotas else _DEFAULT_THREADS)


def _return_freed_memory() -> None:
    """Give what reading and quantising used in passing back to the system; glibc keeps freed pieces below 32 MiB."""
    with suppress(AttributeError):  # other C libraries have no such call, or no need of it
        ctypes.CDLL(None).malloc_trim(0)
