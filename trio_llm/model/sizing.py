"""How large a GPU's KV pool is: what the largest steps, measured, leave of the memory that may be used.

Letters: B rows of a step.
"""

from __future__ import annotations

import attrs
import numpy as np
import torch

from trio_llm.config import EngineConfig
from trio_llm.errors import ConfigError
from trio_llm.model.attention import AttentionBatch, lay_out
from trio_llm.model.device import Gpu
from trio_llm.model.kv_cache import KVCache, KVLayout
from trio_llm.model.loader import LoadedModel, Model
from trio_llm.model.memory import GIB, MemoryBudget, max_sampled_tokens


def usable_bytes(device: Gpu, config: EngineConfig) -> int:
    """Return what may still be taken: of what is free, all but the part that utilization leaves alone."""
    free, total = device.memory()
    return max(0, free - int((1 - config.gpu_memory_utilization) * total))


def size_pool(budget: MemoryBudget, loaded: LoadedModel, config: EngineConfig, device: Gpu) -> MemoryBudget:
    """Return the budget with a measured workspace, and with the blocks that were asked for, else those that fit.

    All weights are on the device, the pool is not. A draft model's steps are smaller, and follow the model's. More
    blocks than `max_batch_size` of the longest sequences can own would be of use to nobody but the prefix cache, and
    cost the block manager time.

    Raises:
        ConfigError: What was asked for does not fit, or nothing does.
    """
    workspace = measure_workspace(loaded.model, loaded.kv_layout, config, device)
    room = usable_bytes(device, config) - workspace
    fitting = max(0, room // (budget.block_bytes + budget.draft_block_bytes))
    most = 1 + config.max_batch_size * sum(budget.sequence_bytes) // budget.block_bytes
    num_blocks = config.num_kv_blocks or min(fitting, most)
    note = "measured" if config.enforce_eager else "measured, graphs included"
    budget = attrs.evolve(budget, num_kv_blocks=num_blocks, workspace_bytes=workspace, workspace_note=note)
    if 2 <= num_blocks <= fitting:
        return budget
    left = (
        f"beside weights of {budget.weight_bytes / GIB:.2f} GiB and a workspace of {workspace / GIB:.2f} GiB, "
        f"{max(0, room) / GIB:.2f} GiB are left of what --gpu-memory-utilization allows"
    )
    if fitting >= 2:
        raise ConfigError("num_kv_blocks", num_blocks, "memory", f"{left}; --kv-blocks {fitting} would fit")
    utilization = config.gpu_memory_utilization
    raise ConfigError("gpu_memory_utilization", utilization, "memory", f"{left}; raise it, or choose a smaller --model")


@torch.inference_mode()
def measure_workspace(model: Model, layout: KVLayout, config: EngineConfig, device: Gpu) -> int:
    """Return the memory that the largest steps take: many rows, one long row, and what decode graphs keep.

    Graphs have memory of their own, next to that of steps that are launched call by call.
    """
    tokens, rows = config.max_num_batched_tokens, min(config.max_batch_size, config.max_num_batched_tokens)
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
    """Return a batch of prompts whose every block is the null block."""
    starts = np.zeros_like(counts)
    longest = int(counts.max())
    columns = device.send([np.zeros(counts.sum(), np.int64), *lay_out(starts, counts)])
    tables = [
        torch.zeros((len(counts), -(-longest // group.block_size)), dtype=torch.int32, device=device.torch_device)
        for group in layout.groups
    ]
    return AttentionBatch.of(columns, starts.tolist(), counts.tolist(), tables, layout)
