"""Columns packed into host buffers that take turns."""

from __future__ import annotations

import attrs
import numpy as np
import pytest
import torch
from torch import Tensor

from trio_llm.model.device.device import Mark
from trio_llm.model.device.staging import Staging

COLUMNS = [
    np.arange(5, dtype=np.int64),
    np.zeros(0, np.int32),
    np.array([[1.5, -2.5]], np.float32),
    np.arange(3, dtype=np.uint8),
    np.arange(8, dtype=np.int32)[::2],
]


@attrs.define
class Copied:
    """A mark that counts how often it was waited for."""

    waits: int = 0

    def wait(self) -> None:
        self.waits += 1

    def seconds_since(self, earlier: Mark) -> float:
        raise AssertionError("nobody times a copy")


@pytest.fixture
def marks() -> list[Copied]:
    """Return the marks that were set, filled as copies are made."""
    return []


@pytest.fixture
def allocated() -> list[int]:
    """Return the sizes that were allocated."""
    return []


@pytest.fixture
def staging(marks: list[Copied], allocated: list[int]) -> Staging:
    """Return a staging area whose device is the host."""

    def allocate(num_bytes: int) -> Tensor:
        allocated.append(num_bytes)
        return torch.full((num_bytes,), 0xAA, dtype=torch.uint8)

    def mark() -> Mark:
        marks.append(Copied())
        return marks[-1]

    return Staging(allocate, torch.device("cpu"), mark)


def test_columns_arrive_as_they_were(staging: Staging) -> None:
    """Values, shapes and dtypes survive the packing, empty and strided columns too; no column gives no copy."""
    for column, tensor in zip(COLUMNS, staging.send(COLUMNS), strict=True):
        assert tensor.dtype == torch.from_numpy(column[:0]).dtype
        assert np.array_equal(tensor.numpy(), column)
        assert tensor.data_ptr() % 16 == 0 or not len(column)
    assert staging.send([]) == []


def test_a_buffer_is_written_again_only_once_its_copy_is_done(staging: Staging, marks: list[Copied]) -> None:
    """Two copies for each of two steps wait for nothing; the one after them waits for the first alone."""
    for _ in range(4):
        staging.send(COLUMNS)
    assert [mark.waits for mark in marks] == [0, 0, 0, 0]
    staging.send(COLUMNS)
    assert [mark.waits for mark in marks] == [1, 0, 0, 0, 0]


def test_what_was_sent_stays_as_it_was(staging: Staging) -> None:
    """Tensors of one step are not those of another, however many follow."""
    sent = [staging.send([np.full(4, number)])[0] for number in range(9)]
    assert [tensor.tolist() for tensor in sent] == [[number] * 4 for number in range(9)]


def test_buffers_grow(staging: Staging, allocated: list[int]) -> None:
    """A step larger than all before gets a larger buffer, with room for a little more; the copy is whole."""
    large = np.arange(100_000)
    (tensor,) = staging.send([large])
    assert np.array_equal(tensor.numpy(), large)
    staging.send([np.zeros(8)]), staging.send([np.zeros(8)]), staging.send([np.zeros(8)])
    staging.send([large])
    assert allocated == [1 << 16] * 4 + [2 * large.nbytes]
