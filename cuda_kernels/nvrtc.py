"""NVIDIA's run-time compiler through ctypes: needs its shared library alone, no GPU, driver, toolkit or CuPy."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Sequence
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_void_p
from pathlib import Path

_MAJORS = (13, 12)  # newest first
_DRIVER = "libcuda.so.1"


class CompileError(RuntimeError):
    """A kernel did not compile; the message is the compiler's log."""


def _candidates() -> list[str]:
    """Return what to hand to dlopen: the libraries of NVIDIA's wheels, then the bare names for the system's loader."""
    found: list[str] = []
    spec = importlib.util.find_spec("nvidia")
    driver = driver_major()
    # A driver does not load machine code that a compiler of a newer major version made.
    majors = [major for major in _MAJORS if driver is None or major <= driver]
    for root in spec.submodule_search_locations or () if spec else ():
        for major in majors:
            found += [str(path) for path in sorted(Path(root).glob(f"*/lib/libnvrtc.so.{major}*"))]
    return found + [f"libnvrtc.so.{major}" for major in majors]


def driver_major() -> int | None:
    """Return the major version of CUDA up to which this machine's driver goes; None if there is no driver."""
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError:
        return None
    version = c_int()
    return None if driver.cuDriverGetVersion(byref(version)) else version.value // 1000


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the loaded library, or None where there is none."""
    for name in _candidates():
        try:
            # NVRTC opens its builtins by bare name, which only finds those of a wheel if they are loaded already.
            for builtins in Path(name).parent.glob(Path(name).name.replace("libnvrtc", "libnvrtc-builtins") + "*"):
                ctypes.CDLL(str(builtins))
            loaded = ctypes.CDLL(name)
        except OSError:
            continue
        loaded.nvrtcGetErrorString.restype = c_char_p
        # handle, source, name, header count, header texts, header names
        loaded.nvrtcCreateProgram.argtypes = [POINTER(c_void_p), c_char_p, c_char_p, c_int, c_void_p, c_void_p]
        loaded.nvrtcCompileProgram.argtypes = [c_void_p, c_int, POINTER(c_char_p)]
        loaded.nvrtcDestroyProgram.argtypes = [POINTER(c_void_p)]
        for part in ("PTX", "CUBIN", "ProgramLog"):
            getattr(loaded, f"nvrtcGet{part}Size").argtypes = [c_void_p, POINTER(c_size_t)]
            getattr(loaded, f"nvrtcGet{part}").argtypes = [c_void_p, c_char_p]
        return loaded
    return None


def version() -> str:
    """Return "major.minor" of the library, which must be there."""
    lib = library()
    assert lib is not None
    major, minor = c_int(), c_int()
    _check(lib, lib.nvrtcVersion(byref(major), byref(minor)))
    return f"{major.value}.{minor.value}"


@functools.cache
def architectures() -> tuple[int, ...]:
    """Return what the library, which must be there, can compile for: 90 for compute capability 9.0."""
    lib = library()
    assert lib is not None
    count = c_int()
    _check(lib, lib.nvrtcGetNumSupportedArchs(byref(count)))
    found = (c_int * count.value)()
    _check(lib, lib.nvrtcGetSupportedArchs(found))
    return tuple(found)


def compile_program(source: str, name: str, arch: str, options: Sequence[str]) -> tuple[bytes, bytes, str]:
    """Compile one source text.

    Args:
        arch: `sm_90`, or `compute_90` for PTX alone, which takes less than half the time.
    Returns:
        PTX, machine code (empty for PTX alone) and the compiler's log.
    Raises:
        CompileError: It does not compile.
    """
    lib = library()
    assert lib is not None
    program = c_void_p()
    _check(lib, lib.nvrtcCreateProgram(byref(program), source.encode(), name.encode(), 0, None, None))
    try:
        encoded = [option.encode() for option in (f"-arch={arch}", *options)]
        failed = lib.nvrtcCompileProgram(program, len(encoded), (c_char_p * len(encoded))(*encoded))
        log = _part(lib, program, "ProgramLog").decode().rstrip("\0")
        if failed:
            raise CompileError(f"{name}: {log or lib.nvrtcGetErrorString(failed).decode()}")
        cubin = _part(lib, program, "CUBIN") if arch.startswith("sm_") else b""
        return _part(lib, program, "PTX").rstrip(b"\0"), cubin, log
    finally:
        lib.nvrtcDestroyProgram(byref(program))


def _part(lib: ctypes.CDLL, program: c_void_p, part: str) -> bytes:
    size = c_size_t()
    _check(lib, getattr(lib, f"nvrtcGet{part}Size")(program, byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(lib, getattr(lib, f"nvrtcGet{part}")(program, buffer))
    return buffer.raw


def _check(lib: ctypes.CDLL, code: int) -> None:
    if code:
        raise RuntimeError(f"NVRTC: {lib.nvrtcGetErrorString(code).decode()}")
