"""Launch a compiled kernel: arguments checked against its declaration, on torch's current stream, through CuPy.

A Python float handed to CuPy becomes a double and is then read as garbage by a `float` parameter; a tensor of the
wrong dtype is read as whatever the declaration says. Both are impossible here: every argument is converted or
refused by the type that the .cu file declares.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from cuda_kernels import compile as compiling
from cuda_kernels.signature import Parameter, entries

Dim3 = tuple[int, int, int]
Argument = torch.Tensor | int | float | None
# `io_t` is the activation type, which a -D chooses; the rest are fixed.
_DTYPES = {
    "float": (torch.float32,), "int": (torch.int32,), "s8": (torch.int8,), "u8": (torch.uint8, torch.bool),
    "u32": (torch.int32, torch.uint32), "s64": (torch.int64,), "u64": (torch.int64, torch.uint64),
}  # fmt: skip
_MAX_STATIC_SHARED_BYTES = 48 * 1024  # above it a kernel has to ask for more


@dataclass(frozen=True)
class Kernel:
    """One entry point of one specialised source.

    Attributes:
        source: File name in this package.
        entry: Name of the `extern "C"` function.
        defines: Macros, sorted pairs (see `kernel`).
    """

    source: str
    entry: str
    defines: tuple[tuple[str, str | int], ...]

    @property
    def text(self) -> str:
        return compiling.expand(self.source)

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return entries(self.text)[self.entry]

    def build(self, arch: str) -> compiling.Built:
        return compiling.build_text(self.text, self.source, dict(self.defines), arch)

    def __call__(self, grid: Dim3, block: Dim3, shared_bytes: int, *args: Argument) -> None:
        """Launch; `args` are in the order of the declaration.

        Raises:
            TypeError: An argument does not fit its declaration.
        """
        if 0 in grid:
            return  # nothing to do, and CUDA refuses an empty grid
        _launcher.launch(self, grid, block, shared_bytes, check(self, args))


def kernel(source: str, entry: str, **defines: str | int) -> Kernel:
    """Name a kernel and its specialisation."""
    return Kernel(source, entry, tuple(sorted(defines.items())))


def io_define(dtype: torch.dtype) -> int | None:
    """Return IO_FP16 for an activation dtype; None where no kernel takes it."""
    return {torch.bfloat16: 0, torch.float16: 1}.get(dtype)


def unfit(x: torch.Tensor) -> str | None:
    """Say why kernels cannot read rows x [..., n] in pieces of 16 bytes; None where they can."""
    if io_define(x.dtype) is None:
        return f"dtype {x.dtype}"
    strides_bytes = [stride * x.element_size() for stride in x.stride()[:-1]]
    if x.stride(-1) != 1 or x.data_ptr() % 16 or any(stride % 16 for stride in strides_bytes):
        return "rows that do not begin at 16 bytes"
    return None


class Launcher(Protocol):
    """Something that can run a kernel: CuPy on a GPU, or the simulator."""

    def launch(self, kernel: Kernel, grid: Dim3, block: Dim3, shared_bytes: int, args: Sequence[Any]) -> None:
        """Run one grid; `args` are tensors, None and numpy scalars, already checked."""
        ...


def check(kernel: Kernel, args: Sequence[Argument]) -> list[Any]:
    """Convert arguments to exactly what the kernel declares: tensors and None stay, numbers become numpy scalars."""
    parameters = kernel.parameters
    if len(args) != len(parameters):
        raise TypeError(f"{kernel.entry} takes {len(parameters)} arguments, got {len(args)}")
    defines = dict(kernel.defines)
    return [_convert(kernel.entry, defines, p, arg) for p, arg in zip(parameters, args, strict=True)]


def _convert(entry: str, defines: Mapping[str, str | int], p: Parameter, arg: Argument) -> Any:
    where = f"{entry}, argument {p.name}"
    if p.pointer:
        if arg is None:
            return None
        if not isinstance(arg, torch.Tensor):
            raise TypeError(f"{where}: expected a tensor, got {arg!r}")
        allowed = _pointee(p.type, defines)
        if arg.dtype not in allowed:
            raise TypeError(f"{where}: expected {' or '.join(map(str, allowed))}, got {arg.dtype}")
        return arg
    if isinstance(arg, torch.Tensor) or arg is None or isinstance(arg, bool):
        raise TypeError(f"{where}: expected {p.type}, got {type(arg).__name__}")
    if p.type == "float":
        return np.float32(arg)
    if not isinstance(arg, int):
        raise TypeError(f"{where}: expected {p.type}, got {arg!r}")
    return np.int32(arg) if p.type == "int" else np.uint64(arg)  # numpy refuses a number that does not fit


def _pointee(name: str, defines: Mapping[str, str | int]) -> tuple[torch.dtype, ...]:
    if name == "io_t":
        return (torch.float16 if defines.get("IO_FP16") else torch.bfloat16,)
    if name == "weight_t":
        return (torch.int8,) if defines.get("INT8") else _pointee("io_t", defines)
    if name == "kv_t":
        return (torch.int8,) if defines.get("KV_INT8") else _pointee("io_t", defines)
    return _DTYPES[name]


@dataclass(frozen=True)
class _Stream:
    """The little of a stream that CuPy's launch needs."""

    ptr: int


class CupyLauncher:
    """Runs kernels on the current CUDA device; CuPy is imported with the first launch."""

    def launch(self, kernel: Kernel, grid: Dim3, block: Dim3, shared_bytes: int, args: Sequence[Any]) -> None:
        device = torch.cuda.current_device()
        for p, arg in zip(kernel.parameters, args, strict=True):
            if isinstance(arg, torch.Tensor) and arg.device != torch.device("cuda", device):
                raise TypeError(f"{kernel.entry}, argument {p.name}: is on {arg.device}, not on cuda:{device}")
        function = _loaded(kernel, device, shared_bytes)
        raw = tuple(_pointer(arg) if arg is None or isinstance(arg, torch.Tensor) else arg for arg in args)
        # Asked for at every launch: under graph capture the current stream is another one.
        stream = _Stream(torch.cuda.current_stream(device).cuda_stream)
        function(grid, block, raw, shared_mem=shared_bytes, stream=stream)


def _pointer(tensor: torch.Tensor | None) -> np.uint64:
    return np.uint64(0 if tensor is None else tensor.data_ptr())


@functools.cache
def _loaded(kernel: Kernel, device: int, shared_bytes: int) -> Any:
    import cupy  # pyright: ignore[reportMissingImports] - an extra

    major, minor = torch.cuda.get_device_capability(device)
    built = kernel.build(f"sm_{major}{minor}")
    with cupy.cuda.Device(device):
        function = cupy.RawModule(path=str(built.cubin_path)).get_function(kernel.entry)
        if shared_bytes > _MAX_STATIC_SHARED_BYTES:
            function.max_dynamic_shared_size_bytes = shared_bytes
    return function


_launcher: Launcher = CupyLauncher()


@contextlib.contextmanager
def using(launcher: Launcher) -> Generator[None]:
    """Run kernels by another launcher inside the block: the tests' simulator."""
    global _launcher  # noqa: PLW0603 - one place decides for all wrappers
    before, _launcher = _launcher, launcher
    try:
        yield
    finally:
        _launcher = before
