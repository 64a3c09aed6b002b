"""Where the model runs, as far as the runner cares: copies, points in the queue of work, faults, memory."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from time import perf_counter
from typing import Any, Protocol, runtime_checkable

import attrs
import torch
from numpy.typing import NDArray
from torch import Tensor

from trio_llm.errors import EngineDeadError

# Records work that has run before, and returns what queues it once more, on the same memory.
Capture = Callable[[Callable[[], None]], Callable[[], None]]


class Mark(Protocol):
    """A point in the queue of work."""

    def wait(self) -> None:
        """Wait until all work queued before it is done. Any thread may."""
        ...

    def seconds_since(self, earlier: Mark) -> float:
        """Return the time between two points that have passed."""
        ...


class Device(Protocol):
    """A queue of work and the memory that it works on. One thread queues, inside `working`."""

    torch_device: torch.device

    def working(self) -> AbstractContextManager[None]:
        """Queue here what is called inside."""
        ...

    def send(self, columns: Sequence[NDArray[Any]]) -> list[Tensor]:
        """Return host arrays as tensors here. The arrays are not written again."""
        ...

    def to_host(self, tensor: Tensor) -> Tensor:
        """Return a tensor on the host that holds the same once the next mark has passed."""
        ...

    def mark(self) -> Mark:
        """Return the point in the queue that is its end now."""
        ...

    def is_lost(self) -> bool:
        """Say whether a fault makes every further call fail. Any thread may ask."""
        ...

    def release(self) -> None:
        """Give back memory that no tensor uses any more."""
        ...


@runtime_checkable
class Gpu(Device, Protocol):
    """A device of its own memory, whose work can be captured."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Do what `Capture` says."""
        ...

    def peak_bytes(self, work: Callable[[], object]) -> int:
        """Do work; return the most memory that was held for it at one time."""
        ...

    def memory(self) -> tuple[int, int]:
        """Return the bytes that are free for everybody, and all there are."""
        ...


@attrs.frozen
class _Now:
    """On a CPU work is done when it is queued."""

    at_s: float

    def wait(self) -> None:
        pass

    def seconds_since(self, earlier: Mark) -> float:
        assert isinstance(earlier, _Now)
        return self.at_s - earlier.at_s


class Cpu:
    """The processor that runs this code."""

    torch_device = torch.device("cpu")

    def working(self) -> AbstractContextManager[None]:
        return nullcontext()

    def send(self, columns: Sequence[NDArray[Any]]) -> list[Tensor]:
        return [torch.from_numpy(column) for column in columns]

    def to_host(self, tensor: Tensor) -> Tensor:
        return tensor

    def mark(self) -> Mark:
        return _Now(perf_counter())

    def is_lost(self) -> bool:
        return False

    def release(self) -> None:
        pass


@contextmanager
def fatal_if_lost(device: Device) -> Generator[None]:
    """Turn an exception into EngineDeadError where the device is lost; any other is the step's own, out of memory too.

    Which it was does not show in the exception: the same error of a launch may be a bad argument or the echo of a fault
    long before. So the device is asked.
    """
    try:
        yield
    except Exception as error:
        if device.is_lost():
            first = str(error).partition("\n")[0]
            raise EngineDeadError(f"The device failed: {type(error).__name__}: {first}") from error
        raise
