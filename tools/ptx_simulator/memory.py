"""Global and shared memory of a simulated GPU: every access is checked for bounds and alignment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from tools.ptx_simulator.errors import KernelFaultError

Integers = NDArray[np.int64]
Bytes = NDArray[np.uint8]
_SPAN_BITS = 40  # each storage has this much address space, so that an access past its end hits nothing


@dataclass
class _Segment:
    """The bytes of one storage, and which of them the kernel was given."""

    data: Bytes
    start: int
    end: int
    writable: bool


def _cells(data: Bytes, width: int, item: int) -> NDArray[np.unsignedinteger]:
    """Look at bytes as aligned cells of `width` bytes: [cells, width / item] unsigned integers of `item` bytes."""
    whole = data[: len(data) // width * width]
    return whole.view(f"u{item}").reshape(-1, width // item)


def _offset_bytes(tensor: torch.Tensor) -> int:
    return int(tensor.storage_offset()) * tensor.element_size()


def _span_bytes(tensor: torch.Tensor) -> int:
    """Return the bytes from a tensor's first to its last element."""
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int(last + 1) * tensor.element_size()


class GlobalMemory:
    """The tensors a kernel was given. It reads and writes their very storage; what lies outside them raises."""

    def __init__(self, tensors: Sequence[tuple[torch.Tensor, bool]], early: Sequence[torch.Tensor]) -> None:
        """Map tensors, each with whether the kernel may write it (its parameter is not a pointer to const).

        Args:
            early: Those of them that may be read before the kernel has waited for those before it.
        """
        self._segments: list[_Segment] = []
        self._of_storage: dict[int, int] = {}
        for tensor, writable in tensors:
            if tensor.numel():
                self._map(tensor, writable)
        starts = [(self.address(tensor), tensor) for tensor in early if tensor.numel()]
        self._early = [(start, start + _span_bytes(tensor)) for start, tensor in starts]

    def _map(self, tensor: torch.Tensor, writable: bool) -> None:
        storage = tensor.untyped_storage()
        start = _offset_bytes(tensor)
        end = start + _span_bytes(tensor)
        index = self._of_storage.setdefault(storage.data_ptr(), len(self._segments))
        if index == len(self._segments):
            data = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
            self._segments.append(_Segment(data, start, end, writable))
        else:
            segment = self._segments[index]
            segment.start, segment.end = min(segment.start, start), max(segment.end, end)
            segment.writable |= writable

    def address(self, tensor: torch.Tensor) -> int:
        """Return the address that the kernel sees."""
        if not tensor.numel():
            return 0
        index = self._of_storage[tensor.untyped_storage().data_ptr()]
        return (index + 1 << _SPAN_BITS) + _offset_bytes(tensor)

    def is_early(self, addresses: Integers) -> bool:
        """Return whether all these may be read before the kernel has waited for those before it."""
        inside = [(addresses >= start) & (addresses < end) for start, end in self._early]
        return bool(np.any(inside, axis=0).all()) if inside else False

    def _parts(
        self, addresses: Integers, width: int, what: str, *, write: bool = False
    ) -> Iterator[tuple[_Segment, slice | NDArray[np.bool_], Integers]]:
        """Split accesses by storage: (segment, which of them, cell numbers)."""
        if (addresses % width).any():
            raise KernelFaultError(f"{what}: misaligned access of {width} bytes")
        numbers = (addresses >> _SPAN_BITS) - 1
        first = int(numbers[0])
        parts = [(first, slice(None))] if (numbers == first).all() else [(int(n), numbers == n) for n in set(numbers)]
        for number, which in parts:
            if not 0 <= number < len(self._segments):
                raise KernelFaultError(f"{what}: address outside every argument")
            segment = self._segments[number]
            offsets = addresses[which] - (number + 1 << _SPAN_BITS)
            if offsets.min() < segment.start or offsets.max() + width > segment.end:
                raise KernelFaultError(f"{what}: out of bounds by bytes {offsets.min()}..{offsets.max() + width} of "
                                  f"{segment.start}..{segment.end}")  # fmt: skip
            if write and not segment.writable:
                raise KernelFaultError(f"{what}: writes an argument declared const")
            yield segment, which, offsets // width

    def load(self, addresses: Integers, width: int, item: int, what: str) -> NDArray[np.unsignedinteger]:
        """Read `width` bytes per lane: [lanes, width / item] unsigned integers of `item` bytes."""
        out = np.empty((len(addresses), width // item), f"u{item}")
        for segment, which, cells in self._parts(addresses, width, what):
            out[which] = _cells(segment.data, width, item)[cells]
        return out

    def store(self, addresses: Integers, values: NDArray[np.unsignedinteger], what: str) -> None:
        """Write values [lanes, n]."""
        item = values.itemsize
        width = item * values.shape[1]
        for segment, which, cells in self._parts(addresses, width, what, write=True):
            _cells(segment.data, width, item)[cells] = values[which]


class SharedMemory:
    """The shared memory of all blocks of a batch; it starts as bytes of 0xFF, which read as NaN or -1."""

    def __init__(self, blocks: int, size: int) -> None:
        self.size = size
        self._stride = -(-size // 128) * 128
        self._data = np.full(max(blocks * self._stride, 128), 0xFF, np.uint8)

    def _cell_numbers(self, blocks: Integers, addresses: Integers, width: int, what: str) -> Integers:
        if (addresses % width).any():
            raise KernelFaultError(f"{what}: misaligned access of {width} bytes to shared memory")
        if addresses.min() < 0 or addresses.max() + width > self.size:
            raise KernelFaultError(f"{what}: outside the {self.size} bytes of shared memory")
        return (blocks * self._stride + addresses) // width

    def load(
        self, blocks: Integers, addresses: Integers, width: int, item: int, what: str
    ) -> NDArray[np.unsignedinteger]:
        """Read `width` bytes per lane: [lanes, width / item] unsigned integers of `item` bytes."""
        return _cells(self._data, width, item)[self._cell_numbers(blocks, addresses, width, what)]

    def store(self, blocks: Integers, addresses: Integers, values: NDArray[np.unsignedinteger], what: str) -> None:
        """Write values [lanes, n]."""
        item = values.itemsize
        width = item * values.shape[1]
        _cells(self._data, width, item)[self._cell_numbers(blocks, addresses, width, what)] = values

    def poison(self, blocks: Integers, addresses: Integers, width: int, what: str) -> None:
        """Make a destination unreadable until its asynchronous copy lands."""
        _cells(self._data, width, 1)[self._cell_numbers(blocks, addresses, width, what)] = 0xFF
