"""Record a step of kernels once and replay it by one call, like a CUDA graph.

Recorded calls run while they are recorded. Results are in an arena, which reuses memory when no reference to a result
is left, so a tape takes as much memory as one run, and the tapes of an arena share it. Operations of torch and
collectives between the kernels are also recorded, and replayed one by one.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from cpu_kernels.library import loaded, recorder

_ALIGNMENT = 64
_aten = torch.ops.aten
# Operations that return values to Python, or have a result size that depends on values.
_REFUSED = {
    _aten._local_scalar_dense, _aten.equal, _aten.is_nonzero, _aten.nonzero, _aten.masked_select, _aten.bincount,
    _aten._unique2, _aten.unique_dim, _aten.repeat_interleave, _aten.multinomial,
}  # fmt: skip


class CannotRecordError(Exception):
    """An operation depends on values of the recorded run."""


class Arena:
    """Memory for results, freed with the last tensor that views it.

    Blocks are of powers of two of bytes, so that tapes of more and more rows share them: together they take at most
    twice what the largest alone does.
    """

    def __init__(self) -> None:
        self._free: list[NDArray[np.uint8]] = []
        self._starts: list[int] = []
        self._blocks: list[NDArray[np.uint8]] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return uninitialised memory."""
        num_bytes = max(1, int(np.prod(shape)) * dtype.itemsize)
        fitting = [(len(block), i) for i, block in enumerate(self._free) if len(block) >= num_bytes]
        block = self._free.pop(min(fitting)[1]) if fitting else self._allocate(1 << (num_bytes - 1).bit_length())
        view = block[: int(np.prod(shape)) * dtype.itemsize]
        weakref.finalize(view, self._free.append, block).atexit = False
        return torch.from_numpy(view).view(dtype).view(shape)

    def alias(self, tensor: Tensor) -> Tensor:
        """Return a view that does not keep the memory allocated; a tensor of other memory is returned unchanged."""
        at = bisect.bisect_right(self._starts, tensor.data_ptr()) - 1
        if at < 0 or tensor.data_ptr() >= self._starts[at] + len(self._blocks[at]):
            return tensor
        whole = torch.from_numpy(self._blocks[at])[tensor.data_ptr() - self._starts[at] :]
        numbers = whole[: len(whole) // tensor.itemsize * tensor.itemsize].view(tensor.dtype)
        return numbers.as_strided(tensor.shape, tensor.stride())

    def owns(self, tensor: Tensor) -> bool:
        """Return whether the tensor's memory is in this arena."""
        return self.alias(tensor) is not tensor

    def _allocate(self, num_bytes: int) -> NDArray[np.uint8]:
        raw = np.empty(num_bytes + _ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % _ALIGNMENT
        block = raw[start : start + num_bytes]
        place = bisect.bisect(self._starts, block.ctypes.data)
        self._starts.insert(place, block.ctypes.data)
        self._blocks.insert(place, block)
        return block


class _Kernels:
    """A sequence of consecutive kernel calls."""

    def __init__(self) -> None:
        self._functions: list[int] = []
        self._arguments: list[ctypes.Structure] = []
        self._packed: tuple[Any, Any] | None = None

    def add(self, function: Any, arguments: ctypes.Structure) -> None:
        self._functions.append(ctypes.cast(function, ctypes.c_void_p).value or 0)
        self._arguments.append(arguments)

    def __call__(self) -> None:
        count = len(self._functions)
        if self._packed is None:
            addresses = [ctypes.addressof(arguments) for arguments in self._arguments]
            self._packed = (ctypes.c_void_p * count)(*self._functions), (ctypes.c_void_p * count)(*addresses)
        loaded().replay(*self._packed, count)


class Tape:
    """A recorded run. Call it to replay it, on the same memory."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._calls: list[Callable[[], object]] = []
        self._kept: list[Tensor] = []

    def __call__(self) -> None:
        for call in self._calls:
            call()

    def add(self, function: Any, arguments: ctypes.Structure, tensors: tuple[Tensor, ...]) -> None:
        """Record a call of a kernel."""
        with _disable_current_modes():
            self._kept += [tensor for tensor in tensors if not self._arena.owns(tensor)]
        last = self._calls[-1] if self._calls else None
        if not isinstance(last, _Kernels):
            self._calls.append(last := _Kernels())
        last.add(function, arguments)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return memory for a kernel's result."""
        with _disable_current_modes():
            return self._arena.empty(shape, dtype)

    def add_call(self, function: Callable[..., object], tensors: tuple[Tensor, ...]) -> None:
        """Do and record a call of Python on these tensors, e.g. a collective."""
        with _disable_current_modes():
            function(*tensors)
            own = [self._own(tensor) for tensor in tensors]
        self._calls.append(lambda: function(*own))

    def add_operation(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run and record an operation of torch; return its result, in the arena."""
        out = func(*args, **kwargs)
        given = {_storage(tensor) for tensor in _tensors((args, kwargs))}
        made = [tensor for tensor in _tensors(out) if _storage(tensor) not in given]
        writes = any(value.alias_info is not None and value.alias_info.is_write for value in func._schema.returns)
        if not made and not writes:
            return out  # a view
        own_args, own_kwargs = tree_map(self._own, (args, kwargs))
        if writes:
            self._calls.append(lambda: func(*own_args, **own_kwargs))
            return out
        results = tree_map(self._moved, out)
        targets = [self._arena.alias(tensor) for tensor in _tensors(results)]
        if not func.overloadpacket.__name__.startswith(("empty", "new_empty")):
            self._calls.append(lambda: _again(func, own_args, own_kwargs, targets))
        return results

    def _own(self, value: Any) -> Any:
        return self._arena.alias(value) if isinstance(value, Tensor) else value

    def _moved(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        moved = self._arena.empty(tuple(value.shape), value.dtype)
        return moved.copy_(value)


class _Operations(TorchDispatchMode):
    """Records torch's operations on a tape."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Do not import torch's compiler to be skipped by it: that takes a second."""
        return False

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in _REFUSED:
            raise CannotRecordError(f"{func} reads values while a step is recorded")
        return self._tape.add_operation(func, args, kwargs or {})


def record(work: Callable[[], object], arena: Arena) -> Tape:
    """Do the work; return the tape that repeats it.

    Raises:
        CannotRecordError: The work depends on values; the tape would repeat the decisions for these.
    """
    tape = Tape(arena)
    token = recorder.set(tape)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_Operations(tape))
            work()
    finally:
        recorder.reset(token)
    return tape


def _again(func: Any, args: Any, kwargs: Any, targets: Sequence[Tensor]) -> None:
    for target, result in zip(targets, _tensors(func(*args, **kwargs)), strict=True):
        target.copy_(result)


def _tensors(tree: Any) -> Iterable[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
