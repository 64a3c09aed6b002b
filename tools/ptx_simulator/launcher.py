"""Launch kernels on the CPU: the same interface as the launcher for GPUs, over CPU tensors."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from cuda_kernels.dependent import OLDEST
from cuda_kernels.launch import Kernel
from tools.ptx_simulator import arithmetic, conversion, transfer, warp
from tools.ptx_simulator.counters import Counters
from tools.ptx_simulator.decode import decode
from tools.ptx_simulator.machine import LOCKSTEP, Dim3, Machine, Operate
from tools.ptx_simulator.memory import GlobalMemory
from tools.ptx_simulator.program import Program, parse

INSTRUCTION_SETS = (arithmetic, conversion, transfer, warp)  # importing them registers their decoders
_MAX_LANES = 8192  # blocks run side by side up to this many lanes; a guess at where numpy's overhead is spread well
_DEPENDENT = 10 * OLDEST[0] + OLDEST[1]
_MAX_SHARED_BYTES = 227 * 1024  # what a block of an H100 may have


@functools.lru_cache(maxsize=64)
def _prepare(ptx: str, entry: str) -> tuple[Program, tuple[Operate | None, ...]]:
    program = parse(ptx, entry)
    return program, decode(program)


class SimulatedLauncher:
    """Runs kernels compiled for `arch`, warps in a given order (see machine.ORDERS)."""

    def __init__(
        self, arch: str = "compute_90", order: int = LOCKSTEP, counters: Counters | None = None,
        most_blocks: int | None = None,
    ) -> None:  # fmt: skip
        """Make a launcher; with `most_blocks` it runs only so many blocks of a grid, from all over it: to count."""
        self._arch, self._order, self._counters, self._most_blocks = arch, order, counters, most_blocks

    def launch(self, kernel: Kernel, grid: Dim3, block: Dim3, shared_bytes: int, args: Sequence[Any]) -> None:
        written = [not p.read_only for p in kernel.parameters]
        early = [p.early for p in kernel.parameters] if int(self._arch.split("_")[1]) >= _DEPENDENT else None
        self.launch_ptx(kernel.build(self._arch).ptx, kernel.entry, grid, block, shared_bytes, args, written, early)

    def launch_ptx(
        self, ptx: str, entry: str, grid: Dim3, block: Dim3, shared_bytes: int, args: Sequence[Any],
        written: Sequence[bool], early: Sequence[bool] | None = None,
    ) -> None:  # fmt: skip
        """Run a kernel of a PTX text.

        Args:
            written: Which tensors it may write.
            early: Which it may read before it has waited for the kernels before it; None where it begins after them.
        """
        assert shared_bytes <= _MAX_SHARED_BYTES, f"{entry}: {shared_bytes} bytes of shared memory"
        program, code = _prepare(ptx, entry)
        tensors = [(arg, w) for arg, w in zip(args, written, strict=True) if isinstance(arg, torch.Tensor)]
        chosen = [arg for arg, e in zip(args, early, strict=True) if e] if early else []
        memory = GlobalMemory(tensors, [arg for arg in chosen if arg is not None])
        arguments = {name: _bits(arg, kind, memory) for (name, kind), arg in zip(program.parameters, args, strict=True)}
        side_by_side = max(1, _MAX_LANES // int(np.prod(block)))
        total = int(np.prod(grid))
        count = min(total, self._most_blocks or total)
        numbers = np.sort(np.arange(count) * _stride(total) % total)
        for first in range(0, count, side_by_side):
            blocks = numbers[first : first + side_by_side]
            batch = Machine(
                program, code, arguments, memory, blocks, grid, block, shared_bytes, self._order, self._counters,
                is_dependent=early is not None,
            )  # fmt: skip
            batch.run()


def _stride(total: int) -> int:
    """Return a step through a grid that comes by all blocks, and by few of them is all over each of its dimensions."""
    return next(step for step in range(max(1, round(total * 0.618)), total + 1) if math.gcd(step, total) == 1)


def _bits(arg: Any, kind: str, memory: GlobalMemory) -> np.ndarray:
    """Return an argument as the bits of a parameter of a PTX type."""
    if arg is None or isinstance(arg, torch.Tensor):
        assert kind == "u64", f"a pointer for a parameter of type {kind}"
        return np.array([0 if arg is None else memory.address(arg)], np.uint64)
    assert arg.dtype.itemsize * 8 == int(kind[1:]), f"{arg!r} for a parameter of type {kind}"
    return np.array([arg]).view(f"u{arg.dtype.itemsize}")
