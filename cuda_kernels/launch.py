"""Launch a compiled kernel: arguments checked against its declaration, on torch's current stream, through CuPy.

A Python float handed to CuPy becomes a double and is then read as garbage by a `float` parameter; a tensor of the
wrong dtype is read as whatever the declaration says. Both are impossible here: every argument is converted or
refused by the type that the .cu file declares.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from cuda_kernels import compile as compiling
from cuda_kernels import dependent
from cuda_kernels.signature import Parameter, entries

Dim3 = tuple[int, int, int]
Argument = torch.Tensor | int | float | None
# `io_t` is the activation type, which a -D chooses; the rest are fixed.
_DTYPES = {
    "float": (torch.float32,), "vec16": (torch.int32,),
    "int": (torch.int32,), "s8": (torch.int8,), "u8": (torch.uint8, torch.bool),
    "u32": (torch.int32, torch.uint32), "s64": (torch.int64,), "u64": (torch.int64, torch.uint64),
}  # fmt: skip
_FREE_SHARED_BYTES = 48 * 1024  # above it a kernel has to ask for more


@dataclass(frozen=True, eq=False)  # `kernel` makes each one once, so that it is looked up by identity
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
    def specialisation(self) -> str:
        """The entry point and its macros, for people."""
        return f"{self.entry} {self.macros}".strip()

    @property
    def macros(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.defines)

    @property
    def text(self) -> str:
        return compiling.expand(self.source)

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return entries(self.text)[self.entry]

    @functools.cached_property
    def converters(self) -> tuple[Callable[[Argument], Any], ...]:
        """One function per parameter, made once: a decode step launches hundreds of kernels of a dozen arguments."""
        defines = dict(self.defines)
        return tuple(_converter(self.entry, defines, p) for p in self.parameters)

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


@functools.cache
def kernel(source: str, entry: str, **defines: str | int) -> Kernel:
    """Name a kernel and its specialisation; the same again is the same object."""
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
    converters = kernel.converters
    if len(args) != len(converters):
        raise TypeError(f"{kernel.entry} takes {len(converters)} arguments, got {len(args)}")
    return [convert(arg) for convert, arg in zip(converters, args, strict=True)]


def _converter(entry: str, defines: Mapping[str, str | int], p: Parameter) -> Callable[[Argument], Any]:
    where = f"{entry}, argument {p.name}"
    if p.pointer:
        return _pointer_converter(where, _pointee(p.type, defines))

    def number(arg: Argument) -> Any:
        if isinstance(arg, int) and not isinstance(arg, bool):
            return _int32(arg) if p.type == "int" else np.uint64(arg) if p.type == "u64" else np.float32(arg)
        if p.type == "float" and isinstance(arg, float):
            return np.float32(arg)
        raise TypeError(f"{where}: expected {p.type}, got {arg if isinstance(arg, float) else type(arg).__name__}")

    return number


def _pointer_converter(where: str, allowed: tuple[torch.dtype, ...]) -> Callable[[Argument], Any]:
    def pointer(arg: Argument) -> Any:
        if arg is None:
            return None
        if not isinstance(arg, torch.Tensor):
            raise TypeError(f"{where}: expected a tensor, got {arg!r}")
        if arg.dtype not in allowed:
            raise TypeError(f"{where}: expected {' or '.join(map(str, allowed))}, got {arg.dtype}")
        return arg

    return pointer


@functools.lru_cache(maxsize=4096)
def _int32(value: int) -> np.int32:
    """Convert; the same few sizes come with every launch, and a look-up is cheaper than a new scalar."""
    return np.int32(value)  # which refuses a number that does not fit


def _pointee(name: str, defines: Mapping[str, str | int]) -> tuple[torch.dtype, ...]:
    if name == "io_t":
        return (torch.float16 if defines.get("IO_FP16") else torch.bfloat16,)
    if name == "weight_t":
        return (torch.int8,) if defines.get("INT8") else _pointee("io_t", defines)
    if name == "kv_t" and defines.get("KV_FP8"):
        return (torch.float8_e4m3fn,)
    if name == "kv_t":
        return (torch.int8,) if defines.get("KV_8BIT") else _pointee("io_t", defines)
    if name == "scale_t":
        return (torch.float32 if defines.get("WIDE_SCALES") else torch.float16,)
    if name == "offset_t":
        return (torch.int8,) if defines.get("OFFSET") == 1 else _pointee("scale_t", defines)
    return _DTYPES[name]


class _Stream:
    """The little of a stream that CuPy's launch needs."""

    __slots__ = ("ptr",)

    def __init__(self, ptr: int) -> None:
        self.ptr = ptr


class CupyLauncher:
    """Runs kernels on the current CUDA device; CuPy is imported with the first launch."""

    def __init__(self, *, overlap: bool = True) -> None:
        """Make a launcher; with `overlap`, kernels of a CUDA graph begin early where they can (see `dependent`)."""
        self._overlap = overlap
        self._loaded: dict[tuple[Kernel, int], _Loaded] = {}

    def launch(self, kernel: Kernel, grid: Dim3, block: Dim3, shared_bytes: int, args: Sequence[Any]) -> None:
        device = torch.cuda.current_device()
        raw: list[Any] = []
        for place, arg in enumerate(args):
            if isinstance(arg, torch.Tensor):
                if arg.get_device() != device:
                    name = kernel.parameters[place].name
                    raise TypeError(f"{kernel.entry}, argument {name}: is on {arg.device}, not on cuda:{device}")
                raw.append(arg.data_ptr())  # CuPy passes a Python int as 8 bytes: a pointer
            else:
                raw.append(arg)  # a numpy scalar of the declared size, or None: a null pointer
        loaded = self._loaded.get((kernel, device))
        if loaded is None:
            loaded = self._loaded[kernel, device] = _load(kernel, device, overlap=self._overlap)
        if shared_bytes > loaded.shared_bytes:
            loaded.function.max_dynamic_shared_size_bytes = loaded.shared_bytes = shared_bytes
        # Asked for at every launch: under graph capture the current stream is another one.
        stream = torch.cuda.current_stream(device).cuda_stream
        if loaded.driver is not None and torch.cuda.is_current_stream_capturing():
            # What the host launches now comes too late to begin early.
            dependent.launch(loaded.driver, loaded.function.kernel.ptr, grid, block, shared_bytes, stream, raw)
        else:
            loaded.function(grid, block, tuple(raw), shared_mem=shared_bytes, stream=_Stream(stream))


@dataclass
class _Loaded:
    """A function in a device's memory.

    Attributes:
        driver: Launches it in a graph; None where CuPy does.
        shared_bytes: The most shared memory that it has asked for. It only ever grows: CuPy keeps one module per file,
            so a smaller demand would take back a larger one.
    """

    function: Any
    driver: Any | None
    shared_bytes: int = _FREE_SHARED_BYTES


def _load(kernel: Kernel, device: int, *, overlap: bool) -> _Loaded:
    import cupy  # pyright: ignore[reportMissingImports] - an extra

    capability = torch.cuda.get_device_capability(device)
    built = kernel.build(compiling.target(capability))
    function = cupy.RawModule(path=str(built.binary_path)).get_function(kernel.entry)
    return _Loaded(function, dependent.driver() if overlap and capability >= dependent.OLDEST else None)


_launcher: Launcher = CupyLauncher()


def launcher() -> Launcher:
    """Return what runs kernels now."""
    return _launcher


@contextlib.contextmanager
def using(launcher: Launcher) -> Generator[None]:
    """Run kernels by another launcher inside the block: the tests' simulator."""
    global _launcher  # noqa: PLW0603 - one place decides for all wrappers
    before, _launcher = _launcher, launcher
    try:
        yield
    finally:
        _launcher = before
