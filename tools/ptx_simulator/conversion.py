"""Instructions that move and convert values between registers: mov, cvt, cvta."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tools.ptx_simulator.decode import TYPES, Values, instruction, modifiers, operands, reader, writer
from tools.ptx_simulator.errors import UnsupportedError
from tools.ptx_simulator.machine import Lanes, Machine, Operate
from tools.ptx_simulator.program import Instruction, Operand, Program, Vector


def from_bf16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Widen exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round to nearest, ties to even; NaN becomes the one that the hardware makes."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded.astype(np.uint16))


def from_fp16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Widen exactly."""
    return bits.view(np.float16).astype(np.float32)


def to_fp16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round to nearest, ties to even; beyond the largest is infinite."""
    return np.ascontiguousarray(values).astype(np.float16).view(np.uint16)


HALVES: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "bf16": (from_bf16, to_bf16),
    "f16": (from_fp16, to_fp16),
}


@instruction("mov")
def _mov(ins: Instruction, program: Program) -> Operate:
    _, (kind,) = modifiers(ins, "")
    destination, source = operands(ins, 2)
    if isinstance(destination, Vector):
        return _unpack(destination, source, kind, program)
    if isinstance(source, Vector):
        return _pack(destination, source, kind, program)
    read, write = reader(source, kind, program), writer(destination, kind, program)
    return lambda m, lanes: write(m, lanes, read(m, lanes))


def _part_type(kind: str, parts: int) -> str:
    return f"b{int(kind[1:]) // parts}"


def _unpack(destination: Vector, source: Operand, kind: str, program: Program) -> Operate:
    part = _part_type(kind, len(destination.items))
    read = reader(source, kind, program)
    writes = [writer(item, part, program) for item in destination.items]

    def run(m: Machine, lanes: Lanes) -> None:
        parts = np.ascontiguousarray(read(m, lanes)).view(TYPES[part]).reshape(-1, len(writes))
        for i, write in enumerate(writes):
            write(m, lanes, np.ascontiguousarray(parts[:, i]))

    return run


def _pack(destination: Operand, source: Vector, kind: str, program: Program) -> Operate:
    part = _part_type(kind, len(source.items))
    reads = [reader(item, part, program) for item in source.items]
    write = writer(destination, kind, program)

    def run(m: Machine, lanes: Lanes) -> None:
        parts = np.stack(np.broadcast_arrays(*(read(m, lanes) for read in reads)), 1)
        write(m, lanes, np.ascontiguousarray(parts).view(TYPES[kind])[:, 0])

    return run


@instruction("cvta")
def _cvta(ins: Instruction, program: Program) -> Operate:
    """Between generic addresses and those of a state space: the same numbers here, as each access names its space."""
    flags, (kind,) = modifiers(ins, "to global shared")
    if kind != "u64" or not flags & {"global", "shared"}:
        raise UnsupportedError(ins.text)
    destination, source = operands(ins, 2)
    read, write = reader(source, kind, program), writer(destination, kind, program)
    return lambda m, lanes: write(m, lanes, read(m, lanes))


@instruction("cvt")
def _cvt(ins: Instruction, program: Program) -> Operate:
    flags, (to, source_kind) = modifiers(ins, "rn rni rzi rz ftz", num_types=2)
    if to in ("bf16x2", "f16x2"):
        return _cvt_pair(ins, to, program)
    destination, source = operands(ins, 2)
    read = reader(source, source_kind, program, narrow=source_kind not in HALVES)
    write = writer(destination, to, program, extend=True)
    convert = _conversion(ins, to, source_kind, flags)

    return lambda m, lanes: write(m, lanes, convert(read(m, lanes)))


def _conversion(ins: Instruction, to: str, source: str, flags: frozenset[str]) -> Callable[[Values], Values]:
    dtype = TYPES[to]
    rounding = flags - {"ftz"}
    if to in HALVES and source == "f32" and rounding == {"rn"}:
        return HALVES[to][1]
    if source in HALVES and to == "f32" and not rounding:
        return HALVES[source][0]
    if to in HALVES or source in HALVES:
        raise UnsupportedError(ins.text)
    if source == "f32" and to[0] in "su" and rounding in ({"rni"}, {"rzi"}):
        whole = np.rint if "rni" in flags else np.trunc
        limits = np.iinfo(dtype)
        # PTX saturates and turns NaN into 0.
        return lambda a: np.clip(np.nan_to_num(whole(a.astype(np.float64))), limits.min, limits.max).astype(dtype)
    from_integer = source[0] in "su" and (rounding == {"rn"} if to == "f32" else to[0] in "su" and not rounding)
    if from_integer or (source == to == "f32" and not rounding):
        return lambda a: a.astype(dtype)
    raise UnsupportedError(ins.text)


def _cvt_pair(ins: Instruction, to: str, program: Program) -> Operate:
    """Two floats to a packed pair: the first operand is the upper half."""
    if ins.modifiers != ("rn", to, "f32"):
        raise UnsupportedError(ins.text)
    destination, high, low = operands(ins, 3)
    read_high, read_low = reader(high, "f32", program), reader(low, "f32", program)
    write, shrink = writer(destination, to, program), HALVES[to[:-2]][1]

    def run(m: Machine, lanes: Lanes) -> None:
        upper, lower = shrink(read_high(m, lanes)), shrink(read_low(m, lanes))
        write(m, lanes, (upper.astype(np.uint32) << np.uint32(16)) | lower)

    return run
