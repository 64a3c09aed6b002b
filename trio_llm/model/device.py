"""What a CPU and a GPU differ in for whoever queues work and reads results: copies, and points in the queue."""

from __future__ import annotations

from time import perf_counter
from typing import Protocol

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Mark(Protocol):
    """A point in the queue of work."""

    def wait(self) -> None:
        """Wait until all work queued before it is done. Any thread may."""
        ...

    def seconds_since(self, earlier: Mark) -> float:
        """Return the time between two points that have passed."""
        ...


@attrs.frozen
class _Now:
    """On a CPU work is done when it was queued."""

    at_s: float

    def wait(self) -> None: ...

    def seconds_since(self, earlier: Mark) -> float:
        assert isinstance(earlier, _Now)
        return self.at_s - earlier.at_s


class Cpu:
    """The processor that runs this code."""

    torch_device = torch.device("cpu")

    def to_device(self, column: NDArray[np.generic]) -> Tensor:
        """Return a host array as a tensor where the model runs. The array is not written again."""
        return torch.from_numpy(column)

    def to_host(self, tensor: Tensor) -> Tensor:
        """Return a tensor on the host that holds the same once the next mark has passed."""
        return tensor

    def mark(self) -> Mark:
        return _Now(perf_counter())
