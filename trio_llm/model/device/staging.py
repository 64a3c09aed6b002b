"""Copy a step's columns to a GPU: packed into page-locked memory, one asynchronous copy."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trio_llm.model.device.device import Mark

_ALIGNMENT = 16  # of each column, so that every dtype may be read in place
_LEAST_BYTES = 1 << 16
# A step sends its rows before the forward and its sampling columns after it. The second copy waits in the queue for the
# forward, and a step launched meanwhile must not need that buffer: two buffers for each of two steps in flight.
_NUM_BUFFERS = 4


@attrs.define(eq=False)
class _Buffer:
    """Page-locked memory, and the point after which it may be written again."""

    memory: Tensor
    copied: Mark | None = None


class Staging:
    """Host buffers used in turn, so that columns are written to one while others are still being copied."""

    def __init__(self, allocate: Callable[[int], Tensor], torch_device: torch.device, mark: Callable[[], Mark]) -> None:
        """Take buffers from `allocate`, which returns that many bytes as uint8."""
        self._allocate, self._torch_device, self._mark = allocate, torch_device, mark
        self._buffers = deque(_Buffer(allocate(_LEAST_BYTES)) for _ in range(_NUM_BUFFERS))

    def send(self, columns: Sequence[NDArray[Any]]) -> list[Tensor]:
        """Queue one copy of all columns; return each of them on the device."""
        if not columns:
            return []
        ends = np.cumsum([-(-column.nbytes // _ALIGNMENT) * _ALIGNMENT for column in columns]).tolist()
        buffer = self._take(ends[-1])
        host = buffer.memory.numpy()
        there = torch.empty(ends[-1], dtype=torch.uint8, device=self._torch_device)
        tensors: list[Tensor] = []
        for column, begin in zip(columns, [0, *ends], strict=False):
            place = slice(begin, begin + column.nbytes)
            host[place] = np.ascontiguousarray(column).reshape(-1).view(np.uint8)
            tensors.append(there[place].view(torch.from_numpy(column[:0]).dtype).view(column.shape))
        there.copy_(buffer.memory[: ends[-1]], non_blocking=True)
        buffer.copied = self._mark()
        return tensors

    def _take(self, num_bytes: int) -> _Buffer:
        """Return the next buffer, once it may be written, grown to `num_bytes` if needed."""
        buffer = self._buffers[0]
        self._buffers.rotate(-1)
        if buffer.copied is not None:
            buffer.copied.wait()
        if len(buffer.memory) < num_bytes:
            buffer.memory = self._allocate(2 * num_bytes)
        return buffer
