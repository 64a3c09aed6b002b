"""What a kernel takes, read from its source: the one declaration that both sides must agree with."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

_ENTRY = re.compile(r'extern "C" __global__ void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\(([^)]*)\)')
_PARAMETER = re.compile(
    r"(?P<early>EARLY\s+)?(?P<const>const\s+)?(?P<type>\w+)\s*(?P<pointer>\*)?\s*(?:__restrict__\s+)?(?P<name>\w+)"
)
_COMMENT = re.compile(r"//[^\n]*")


@dataclass(frozen=True)
class Parameter:
    """One parameter: `const float* x` is ("x", "float", pointer, read_only).

    Attributes:
        early: Declared EARLY (see common.cuh): read while kernels before may still be running.
    """

    name: str
    type: str
    pointer: bool
    read_only: bool
    early: bool = False


@functools.cache
def entries(source: str) -> dict[str, tuple[Parameter, ...]]:
    """Return the parameters of each `extern "C"` kernel in an expanded source."""
    return {
        name: tuple(_parameter(text.strip(), name) for text in _COMMENT.sub("", inside).split(","))
        for name, inside in _ENTRY.findall(source)
    }


def _parameter(text: str, kernel: str) -> Parameter:
    found = _PARAMETER.fullmatch(text)
    if found is None:
        raise ValueError(f"{kernel}: cannot read the parameter {text!r}")
    pointer = found["pointer"] is not None
    if not pointer and found["type"] not in ("int", "float", "u64"):
        raise ValueError(f"{kernel}: a parameter by value is int, float or u64, not {found['type']} ({found['name']})")
    return Parameter(found["name"], found["type"], pointer, found["const"] is not None, found["early"] is not None)
