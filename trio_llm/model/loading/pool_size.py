"""The size of a GPU's KV pool: the usable memory minus the measured peak of the largest steps.

With several ranks, each on a GPU of its own, all pools have as many blocks as the fullest GPU has room for.

Letters: B rows of a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import numpy as np
import torch

from trio_llm.config import EngineConfig
from trio_llm.errors import ConfigError
from trio_llm.model.device.device import Gpu
from trio_llm.model.loading.loader import LoadedModel, Model
from trio_llm.model.loading.memory_budget import GIB, MemoryBudget, max_sampled_tokens
from trio_llm.model.loading.prefill_choice import choose_prefills
from trio_llm.model.ops.dispatch import Dispatch
from trio_llm.model.ops.long_prefills import gathered_bytes
from trio_llm.model.paged.attention_batch import AttentionBatch, lay_out
from trio_llm.model.paged.kv_cache import KVCache, KVLayout
from trio_llm.model.parallel.messages import Measured


def usable_bytes(device: Gpu, config: EngineConfig) -> int:
    """Return the bytes that may still be allocated: free memory minus what --gpu-memory-utilization reserves."""
    free, total = device.memory()
    return max(0, free - int((1 - config.gpu_memory_utilization) * total))


def measure_room(loaded: LoadedModel, config: EngineConfig, device: Gpu, dispatch: Dispatch) -> Measured:
    """Choose who attends for long prefills, then measure the largest steps. All weights are on the device, no pool is.

    A draft model's steps are smaller, and run after the model's; its prefills are our kernel's.
    """
    kernels = dispatch.kernels
    if kernels is not None and kernels.NAME == "cuda" and dispatch.mode != "reference":
        choose_prefills(loaded.kv_layout, loaded.plan.dtype, kernels, device, config.step_tokens)
    workspace = measure_workspace(loaded.model, loaded.kv_layout, config, device)
    # The measured steps have short contexts; a prefill may gather the longest.
    workspace += gathered_bytes(config.max_model_len or loaded.plan.max_model_len)
    return Measured(workspace, usable_bytes(device, config))


def size_pool(budget: MemoryBudget, config: EngineConfig, rooms: Sequence[Measured]) -> MemoryBudget:
    """Return the budget with a measured workspace and with the requested blocks, else as many as fit on all ranks.

    Blocks beyond those that `max_batch_size` of the longest sequences can own would serve only the prefix cache, and
    cost the block manager time.

    Args:
        rooms: What each rank measured. Only rank 0 has a draft model.
    Raises:
        ConfigError: The requested blocks do not fit, or none do.
    """
    note = "measured" if config.enforce_eager else "measured, graphs included"
    budget = attrs.evolve(
        budget, workspace_bytes=rooms[0].workspace_bytes, workspace_note=note, rooms=tuple(rooms[1:])
    )  # fmt: skip
    fits = [
        (room.usable_bytes - room.workspace_bytes) // (budget.block_bytes + (0 if rank else budget.draft_block_bytes))
        for rank, room in enumerate(rooms)
    ]
    fullest = min(range(len(rooms)), key=fits.__getitem__)
    fitting = max(0, fits[fullest])
    num_blocks = config.num_kv_blocks or min(fitting, budget.blocks_for(config.max_batch_size))
    if 2 <= num_blocks <= fitting:
        return attrs.evolve(budget, num_kv_blocks=num_blocks)
    workspace, usable = rooms[fullest].workspace_bytes, rooms[fullest].usable_bytes
    of_rank = f" on the GPU of rank {fullest}" if len(rooms) > 1 else ""
    left = (
        f"with weights of {budget.weight_bytes / GIB:.2f} GiB and a workspace of {workspace / GIB:.2f} GiB, "
        f"{max(0, usable - workspace) / GIB:.2f} GiB are left{of_rank} of what --gpu-memory-utilization allows"
    )
    if fitting >= 2:
        raise ConfigError("num_kv_blocks", num_blocks, "memory", f"{left}; --kv-blocks {fitting} would fit")
    utilization = config.gpu_memory_utilization
    raise ConfigError("gpu_memory_utilization", utilization, "memory", f"{left}; raise it, or choose a smaller --model")


@torch.inference_mode()
def measure_workspace(model: Model, layout: KVLayout, config: EngineConfig, device: Gpu) -> int:
    """Return the memory of the largest steps: many rows, one long row, and the decode graphs.

    Graphs have their own memory, in addition to that of steps that are launched call by call.
    """
    tokens, rows = config.step_tokens, min(config.max_batch_size, config.step_tokens)
    kv, sampled = KVCache(layout, 2, device.torch_device), max_sampled_tokens(config)

    def step(num_rows: int, num_tokens: int) -> None:
        counts = np.full(num_rows, num_tokens // num_rows, np.int64)
        counts[: num_tokens % num_rows] += 1
        logits = model.logits(model.forward(_unwritten(counts, layout, device), kv)[:sampled])
        held = logits.clone(), logits.softmax(-1)  # by edits and a draw
        del held

    def largest() -> None:
        step(rows, tokens)
        step(1, tokens)

    peak = device.peak_bytes(largest)
    if config.enforce_eager:
        return peak
    logits_bytes = config.max_batch_size * model.vocab_size * 4
    return peak + device.peak_bytes(lambda: step(rows, rows)) + logits_bytes


def _unwritten(counts: np.ndarray, layout: KVLayout, device: Gpu) -> AttentionBatch:
    """Return a batch of prompts in which every block is the null block."""
    starts = np.zeros_like(counts)
    longest = int(counts.max())
    columns = device.send([np.zeros(counts.sum(), np.int64), *lay_out(starts, counts)])
    tables = [
        torch.zeros((len(counts), -(-longest // group.block_size)), dtype=torch.int32, device=device.torch_device)
        for group in layout.groups
    ]
    return AttentionBatch.of(columns, starts.tolist(), counts.tolist(), tables, layout)
