"""What the tests of all kernels share: the simulator in every order of warps, poisoned memory, error measures."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from cuda_kernels import sample
from cuda_kernels.gemm import split
from cuda_kernels.launch import using
from tools.kernel_lab.cases import poisoned
from tools.ptx_simulator import SimulatedLauncher
from tools.ptx_simulator.counters import Counters
from tools.ptx_simulator.machine import ORDERS

# Twice the relative error of rounding to nearest: half a unit in the last place, and as much for the arithmetic.
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-20}


def simulate(run: Callable[[], tuple[Tensor, ...]], orders: tuple[int, ...] = ORDERS) -> tuple[Tensor, ...]:
    """Run a wrapper with warps in each order; the results must be equal bit for bit."""
    results: list[tuple[Tensor, ...]] = []
    for order in orders:
        with using(SimulatedLauncher(order=order)), poisoned():
            results.append(run())
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert torch.equal(first.view(torch.uint8), second.view(torch.uint8)), "depends on the order of warps"
    return results[0]


def count(run: Callable[[], object]) -> Counters:
    """Run a wrapper once and return the work it was."""
    counters = Counters()
    with using(SimulatedLauncher(counters=counters)):
        run()
    return counters


@contextmanager
def sharing_rows(blocks: int, threads: int = 64) -> Generator[None]:
    """Let so many small blocks share each row of logits: less to simulate than real ones, with every barrier."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "THREADS", threads)
        patch.setattr(sample, "share_row", lambda logits, _: split(logits.shape[1], blocks))
        yield


def assert_close(actual: Tensor, expected: Tensor, *, slack: float = 1.0, of_largest: float = 0.0) -> None:
    """Compare with a float64 reference, within the rounding of the dtype times `slack`.

    Args:
        of_largest: Allowed beside it, as a part of the largest expected value.
    """
    assert expected.dtype == torch.float64 and actual.shape == expected.shape
    scale = ROUNDING[actual.dtype] * slack
    atol = (scale / 16 + of_largest) * float(expected.abs().max())
    torch.testing.assert_close(actual.double(), expected, rtol=scale, atol=atol)
