"""Call the compiled kernels with arguments checked against the C++ declaration and the GIL released, or record them.

A kernel takes one pointer to a struct of pointers, 64-bit integers and doubles. This module reads the struct from the
source, so wrapper and kernel cannot disagree. A recorded call keeps its struct, so a tape is two arrays and is replayed
by one call.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from cpu_kernels import compile as compiling

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}  # codes of common.h
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_POINTERS: dict[str, torch.dtype | None] = {
    "f32": torch.float32, "i64": torch.int64, "i32": torch.int32, "void": None,
}  # fmt: skip
_STRUCT = re.compile(r"^struct (\w+) \{\n(.*?)^\};", re.M | re.S)
_ENTRY = re.compile(r'^extern "C" void (\w+)\(const (\w+Args)\* \w+\)', re.M)
_FIELD = re.compile(r"(?:const )?(?P<type>\w+)(?P<pointer>\*)? (?P<names>\w+(?:, \w+)*)")

Argument = Tensor | int | float | None


class Recorder(Protocol):
    """Records calls of kernels."""

    def add(self, function: Any, arguments: ctypes.Structure, tensors: tuple[Tensor, ...]) -> None:
        """Record a call that has run."""
        ...

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return memory for a result; every replay writes to it."""
        ...

    def add_call(self, function: Callable[..., object], tensors: tuple[Tensor, ...]) -> None:
        """Do and record a call that is neither a kernel's nor an operation of torch."""
        ...


recorder: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return memory for a kernel's result."""
    recording = recorder.get()
    return torch.empty(shape, dtype=dtype) if recording is None else recording.empty(shape, dtype)


def call(function: Callable[..., object], *tensors: Tensor) -> None:
    """Call a function that writes to these tensors and is neither a kernel nor an operation of torch."""
    recording = recorder.get()
    if recording is None:
        function(*tensors)
    else:
        recording.add_call(function, tensors)


class Kernel:
    """One entry point of the library.

    Attributes:
        fields: Name, type and whether it is a pointer, of each field of its struct.
    """

    def __init__(self, name: str, fields: list[tuple[str, str, bool]]) -> None:
        self.name, self.fields = name, fields
        kinds = {"i64": ctypes.c_int64, "f64": ctypes.c_double}
        self._struct = type(
            name, (ctypes.Structure,),
            {"_fields_": [(field, ctypes.c_void_p if pointer else kinds[kind]) for field, kind, pointer in fields]},
        )  # fmt: skip
        self._wanted = [_POINTERS[kind] if pointer else None for _, kind, pointer in fields]

    def __call__(self, *args: Argument) -> None:
        """Call it; `args` are in the order of the struct, tensors for pointers.

        Raises:
            TypeError: An argument does not fit its field.
        """
        values: list[Any] = []
        for arg, wanted in zip(args, self._wanted, strict=True):
            if isinstance(arg, Tensor):
                if wanted is not None and arg.dtype != wanted:
                    raise TypeError(f"{self.name}: {arg.dtype} where {wanted} is declared")
                values.append(arg.data_ptr())
            else:
                values.append(arg)
        arguments = self._struct(*values)
        function = getattr(loaded(), self.name)
        function(ctypes.byref(arguments))
        recording = recorder.get()
        if recording is not None:
            recording.add(function, arguments, tuple(arg for arg in args if isinstance(arg, Tensor)))


@functools.cache
def kernels() -> dict[str, Kernel]:
    """Return every entry point that the sources declare."""
    found: dict[str, Kernel] = {}
    for name in compiling.NAMES:
        text = compiling.expand(name)
        structs = dict(_STRUCT.findall(text))
        found |= {entry: Kernel(entry, _fields(structs[struct])) for entry, struct in _ENTRY.findall(text)}
    return found


def _fields(body: str) -> list[tuple[str, str, bool]]:
    fields: list[tuple[str, str, bool]] = []
    for declaration in re.sub(r"//[^\n]*", "", body).split(";")[:-1]:
        found = _FIELD.fullmatch(" ".join(declaration.split()))
        if found is None or found["type"] not in (_POINTERS if found["pointer"] else ("i64", "f64")):
            raise ValueError(f"cannot read the field {declaration.strip()!r}")
        fields += [(name, found["type"], found["pointer"] is not None) for name in found["names"].split(", ")]
    return fields


_library: ctypes.CDLL | None = None


def load(report: Callable[[int, int], None] = lambda _, __: None) -> None:
    """Compile the kernels if they are not in the cache, and load them.

    Raises:
        CompileError: There is no compiler, or it refused a source.
    """
    global _library  # noqa: PLW0603 - one library a process
    if _library is None:
        _library = open_library(compiling.build(report))
        set_num_threads(default_threads())


def open_library(path: Path) -> ctypes.CDLL:
    """Load a compiled library and declare its functions."""
    library = ctypes.CDLL(str(path))
    for name in kernels():
        getattr(library, name).restype = None
        getattr(library, name).argtypes = [ctypes.c_void_p]
    library.packed_bytes.restype = ctypes.c_int64
    library.packed_bytes.argtypes = [ctypes.c_int64] * 3
    library.replay.restype = None
    library.replay.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    library.set_num_threads.restype = None
    library.set_num_threads.argtypes = [ctypes.c_int64]
    return library


def loaded() -> ctypes.CDLL:
    """Return the library; load it at the first call."""
    if _library is None:
        load()
    assert _library is not None
    return _library


@contextmanager
def using(library: ctypes.CDLL) -> Generator[None]:
    """Use another library inside the block, for tests with their own sources."""
    global _library  # noqa: PLW0603
    before, _library = _library, library
    try:
        yield
    finally:
        _library = before


def default_threads() -> int:
    """Return the processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_num_threads(threads: int) -> None:
    """Set the number of threads of kernels, the caller's included."""
    loaded().set_num_threads(threads)


def unfit(x: Tensor) -> str | None:
    """Return why kernels cannot read rows x [..., n]; None if they can."""
    if x.dtype not in FLOATS:
        return f"dtype {x.dtype}"
    if x.stride(-1) != 1:
        return "strided rows"
    return None


def rows_of(x: Tensor) -> Tensor:
    """View x [..., n] as rows [S, n] of one stride, or copy if there is no such view."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
