"""What a GPU is asked for in a decode step, at a real model's shape and without computing it: kernels and operations.

Everything goes through the seam as in a capture, on tensors without memory, and a launcher that runs nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cuda_kernels import paged_attn
from cuda_kernels.launch import Dim3, Kernel, using
from tools.kernel_lab.shapes import Shape
from tools.kernel_lab.steps import BLOCK, build
from trio_llm.model.ops import cuda as ops_cuda
from trio_llm.model.ops.dispatch import Dispatch
from trio_llm.model.paged.kv_cache import KVCache, plan_kv
from trio_llm.model.step.decode_graphs import DecodeGraphs
from trio_llm.model.step.input_rows import BlockTables

H200 = paged_attn.Device(multiprocessors=132, shared_bytes=227 * 1024)
META = torch.device("meta")
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


@attrs.frozen
class Launch:
    """One launch of a kernel; its arguments are tensors without memory, numbers and None."""

    kernel: Kernel
    grid: Dim3
    block: Dim3
    shared_bytes: int
    args: Sequence[Any]


@attrs.frozen
class Operation:
    """One of torch's operations that is work for the device, with its tensors."""

    name: str
    given: Sequence[Tensor]
    made: Sequence[Tensor]


@attrs.frozen
class Step:
    """The launches and operations of a step, in their order."""

    work: list[Launch | Operation] = attrs.field(factory=list)

    @property
    def launches(self) -> list[Launch]:
        return [one for one in self.work if isinstance(one, Launch)]

    @property
    def operations(self) -> list[Operation]:
        return [one for one in self.work if isinstance(one, Operation)]

    def launch(self, kernel: Kernel, grid: Dim3, block: Dim3, shared_bytes: int, args: Sequence[Any]) -> None:
        """Be the launcher of what is recorded."""
        self.work.append(Launch(kernel, grid, block, shared_bytes, args))


class _Operations(TorchDispatchMode):
    """Records torch's operations but for views and allocations."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self._step = step

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given, made = _tensors((args, kwargs)), _tensors(out)
        writes = any(returned.alias_info and returned.alias_info.is_write for returned in func._schema.returns)
        name = func.overloadpacket.__name__
        if (writes or storages(made) - storages(given)) and name not in ALLOCATIONS:
            self._step.work.append(Operation(name, given, made))
        return out


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def storages(tree: Any) -> set[int]:
    """Return which memory, if it were memory, tensors lie in."""
    return {leaf.untyped_storage()._cdata for leaf in _tensors(tree)}


@contextlib.contextmanager
def _on_h200() -> Generator[None]:
    """Let contexts be split as on an H200."""
    before, paged_attn.SIMULATED = paged_attn.SIMULATED, H200
    paged_attn.device_of.cache_clear()
    try:
        yield
    finally:
        paged_attn.SIMULATED = before
        paged_attn.device_of.cache_clear()


def record_step(shape: Shape, batch: int, bound: int) -> Step:
    """Record the decode of `batch` rows; `bound` is the longest context that the graph is cut for."""
    model, _ = build(shape, META)
    layout = plan_kv(model.specs, block_size=BLOCK, dtype=torch.bfloat16)
    kv, tables = KVCache(layout, 64, META), BlockTables(batch, layout, bound, META)
    logits = torch.empty((batch, model.vocab_size), device=META)
    graphs = DecodeGraphs(model, kv, layout, tables.tables, tables.padding_row, logits, bound)
    steps: list[Step] = []

    def record(work: Callable[[], None]) -> Callable[[], None]:
        for _ in range(2):  # what is only made once is there the second time
            steps.append(step := Step())
            with using(step), _Operations(step):
                work()
        return work

    with _on_h200(), torch.inference_mode():
        dispatch = Dispatch("cuda", ops_cuda, "meta")
        graphs.record_when_needed(record, dispatch)
        if batch > 1:
            graphs.replay(torch.zeros((3, batch), dtype=torch.int64, device=META), dispatch)
    return steps[-1]
