"""Counts of instructions depend on the compiler: the tests' are those of NVRTC 13.5, the newest."""

from __future__ import annotations

from cuda_kernels import nvrtc


def is_older() -> bool:
    """Return whether the NVRTC that is here, such as that of PyTorch's CUDA build, comes before 13.5."""
    return tuple(map(int, nvrtc.version().split("."))) < (13, 5)


def most(instructions: float) -> float:
    """Return a bound for the compiler that is here: 13.0 unrolls other loops, and emits up to a quarter more."""
    return instructions * 1.3 if is_older() else instructions
