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

from cpu_kernels.tape import Arena, CannotRecordError, record
from trio_llm.errors import EngineDeadError
from trio_llm.model.device.host_sync import HostSyncError

# Records work that has run before, and returns a function that queues it again, on the same memory.
Capture = Callable[[Callable[[], None]], Callable[[], None]]


class Mark(Protocol):
    """A point in the queue of work."""

    def wait(self) -> None:
        """Wait until all work queued before it is done. Any thread may call this."""
        ...

    def has_passed(self) -> bool:
        """Return whether all that work is done, without a wait. Any thread may call this."""
        ...

    def seconds_since(self, earlier: Mark) -> float:
        """Return the time between two points that have passed."""
        ...


class Device(Protocol):
    """A queue of work and the memory that it works on. One thread queues, inside `working`."""

    torch_device: torch.device

    def working(self) -> AbstractContextManager[None]:
        """Queue the work of the block on this device."""
        ...

    def send(self, columns: Sequence[NDArray[Any]]) -> list[Tensor]:
        """Return host arrays as tensors on the device. The caller does not write to the arrays again."""
        ...

    def to_host(self, tensor: Tensor) -> Tensor:
        """Return a host tensor that holds the same values once the next mark has passed."""
        ...

    def mark(self) -> Mark:
        """Return the current end of the queue."""
        ...

    def is_lost(self) -> bool:
        """Return whether a fault makes every further call fail. Any thread may call this."""
        ...

    def release(self) -> None:
        """Give back memory that no tensor uses any more."""
        ...


@runtime_checkable
class Gpu(Device, Protocol):
    """A device with its own memory whose work can be captured."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """See `Capture`."""
        ...

    def peak_bytes(self, work: Callable[[], object]) -> int:
        """Do work; return the peak of the memory held for it."""
        ...

    def memory(self) -> tuple[int, int]:
        """Return the free and the total bytes."""
        ...


@attrs.frozen
class _Now:
    """On a CPU work is done when it is queued."""

    at_s: float

    def wait(self) -> None:
        pass

    def has_passed(self) -> bool:
        return True

    def seconds_since(self, earlier: Mark) -> float:
        assert isinstance(earlier, _Now)
        return self.at_s - earlier.at_s


class Cpu:
    """The processor that runs this code."""

    torch_device = torch.device("cpu")

    def __init__(self) -> None:
        self._arena = Arena()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Do work whose kernels are native ones; return a function that repeats it, see `Capture`."""
        try:
            return record(work, self._arena)
        except CannotRecordError as error:
            raise HostSyncError(str(error)) from error

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
        self._arena = Arena()


@contextmanager
def fatal_if_lost(device: Device) -> Generator[None]:
    """Raise EngineDeadError instead of an exception if the device is lost; else the exception is the step's own.

    The exception alone cannot tell: the same launch error may be a bad argument or the effect of an earlier fault. So
    this checks the device.
    """
    try:
        yield
    except Exception as error:
        if device.is_lost():
            first = str(error).partition("\n")[0]
            raise EngineDeadError(f"The device failed: {type(error).__name__}: {first}") from error
        raise
