"""Where packed weights are: side by side, in huge pages, as long as a tensor of them is alive."""

from __future__ import annotations

import gc
import itertools
import mmap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cpu_kernels import weight_memory

pytestmark = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no huge pages on this system")
LARGE = weight_memory._CHUNK + 5


def mapping_of(tensor: Tensor) -> list[str]:
    """Return what the system tells of the mapping that holds a tensor, line by line; [] if there is none."""
    found: list[str] = []
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        bounds = line.split()[0].split("-")
        if len(bounds) == 2:
            inside = int(bounds[0], 16) <= tensor.data_ptr() < int(bounds[1], 16)
        if inside:
            found.append(line)
    return found


def test_matrices_are_side_by_side_and_do_not_overlap() -> None:
    """Each begins at a cache line, close behind the one before; large ones are apart and leave the others together."""
    sizes = [1, 63, 64, 65, 1000, 1 << 20, LARGE, 77]
    tensors = [weight_memory.empty((size,)) for size in sizes]
    for value, tensor in enumerate(tensors):
        tensor.fill_(value)
    assert all((tensor == value).all() for value, tensor in enumerate(tensors))
    assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors)
    small = [tensor for tensor in tensors if len(tensor) != LARGE]
    gaps = [after.data_ptr() - before.data_ptr() - len(before) for before, after in itertools.pairwise(small)]
    assert all(0 <= gap < 64 for gap in gaps)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux tells")
@pytest.mark.parametrize("size", [5, LARGE])
def test_the_system_is_asked_for_huge_pages(size: int) -> None:
    """The mapping has the flag, and the first matrix in it begins with a huge page."""
    kept = weight_memory.empty((size,))
    flags = next(line for line in mapping_of(kept) if line.startswith("VmFlags"))
    assert "hg" in flags.split()
    if size == LARGE:
        assert kept.data_ptr() % (2 << 20) == 0


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux tells")
def test_memory_goes_back_with_the_last_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk is there while any of its matrices, or a view of one, is; then it is unmapped."""
    monkeypatch.setattr(weight_memory, "_chunk", None)  # not the one that models of other tests are in
    first = weight_memory.empty((3, 1 << 20))
    part = first[1, 7:]
    assert mapping_of(part)
    del first
    gc.collect()
    assert mapping_of(part)
    part = torch.empty(1)
    gc.collect()
    assert weight_memory._chunk is not None and weight_memory._chunk() is None


def test_several_threads_may_load() -> None:
    """No two of them get the same bytes."""

    def fill(value: int) -> Tensor:
        return torch.stack([weight_memory.empty((100_000,)).fill_(value) for _ in range(50)])

    with ThreadPoolExecutor(4) as pool:
        filled = list(pool.map(fill, range(4)))
    assert all((tensor == value).all() for value, tensor in enumerate(filled))
    spans = [weight_memory.empty((100_000,)) for _ in range(4)]
    assert len({span.data_ptr() for span in spans}) == 4


def test_nothing_takes_no_memory() -> None:
    """A matrix without entries is a tensor of no bytes."""
    assert weight_memory.empty((0, 5)).shape == (0, 5)
