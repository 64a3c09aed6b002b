"""The launches of a decode step, counted at a real model's shape: each costs a GPU a microsecond, whatever it does.

Everything goes through the seam as in a capture, on tensors without memory, and a launcher that runs nothing.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cuda_kernels import paged_attn
from cuda_kernels.launch import using
from tools.kernel_lab.device import Collector
from tools.kernel_lab.shapes import MODELS
from tools.kernel_lab.steps import build
from trio_llm.model.ops import cuda as ops_cuda
from trio_llm.model.ops.dispatch import Dispatch
from trio_llm.model.paged.kv_cache import KVCache, plan_kv
from trio_llm.model.step.decode_graphs import DecodeGraphs
from trio_llm.model.step.input_rows import BlockTables

META = torch.device("meta")
CONTEXT = 32768
GPU_PAGE = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text(encoding="utf-8")
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class Nodes(TorchDispatchMode):
    """Counts torch's operations that are work for the device: neither views nor allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given, made = storages((args, kwargs)), storages(out)
        writes = any(returned.alias_info and returned.alias_info.is_write for returned in func._schema.returns)
        if (writes or made - given) and func.overloadpacket.__name__ not in ALLOCATIONS:
            self.ops[func.overloadpacket.__name__] += 1
        return out


def storages(tree: Any) -> set[int]:
    """Return which memory, if it were memory, tensors lie in."""
    return {leaf.untyped_storage()._cdata for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)}


@pytest.fixture(autouse=True)
def h200(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let contexts be split as on an H200."""
    paged_attn.device_of.cache_clear()
    monkeypatch.setattr(paged_attn, "SIMULATED", paged_attn.Device(132, 227 * 1024))


def launches(name: str, batch: int) -> tuple[Counter[str], Counter[str]]:
    """Return the kernels, by entry point, and torch's operations of one captured step."""
    model, _ = build(MODELS[name], META)
    layout = plan_kv(model.specs, block_size=16, dtype=torch.bfloat16)
    kv, tables = KVCache(layout, 64, META), BlockTables(batch, layout, CONTEXT, META)
    logits = torch.empty((batch, model.vocab_size), device=META)
    graphs = DecodeGraphs(model, kv, layout, tables.tables, tables.padding_row, logits, CONTEXT)
    kernels, nodes = Collector(), Nodes()

    def capture(work: Any) -> Any:
        with nodes:
            work()
        return work

    with using(kernels), torch.inference_mode():
        graphs.capture(capture, Dispatch("cuda", ops_cuda, "meta"), lambda _: None)
    by_entry: Counter[str] = Counter()
    for kernel, count in kernels.kernels.items():
        by_entry[kernel.entry] += count // 2  # each graph runs once before it is captured
    return by_entry, nodes.ops


def test_launches_of_a_small_model_at_batch_one() -> None:
    """Qwen2.5-0.5B, one row: what docs/gpu.md says."""
    kernels, ops = launches("Qwen2.5-0.5B", 1)
    layers = {"gemv": 4 * 24, "kv_write": 24, "paged_attention": 24}
    assert kernels == Counter(layers) + Counter(prepare_step=1, add_rms_norm=1, gemv=1)
    assert ops == {"embedding": 1, "copy_": 1}
    total = sum(kernels.values()) + sum(ops.values())
    assert total == 149 and f"has {total} launches" in GPU_PAGE
