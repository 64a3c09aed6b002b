"""Instructions that a whole warp executes together: shuffles, votes, ldmatrix, mma (sections 9.7.9, 9.7.13, 9.7.15)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tools.ptx_simulator.conversion import HALVES
from tools.ptx_simulator.decode import Read, address, instruction, items, modifiers, operands, reader, writer
from tools.ptx_simulator.errors import UnsupportedError
from tools.ptx_simulator.machine import Lanes, Machine, Operate
from tools.ptx_simulator.program import Instruction, Operand, Program, Register, Vector

_EVERYONE = 0xFFFFFFFF
_LANE = np.arange(32)


def _require_everyone(mask: NDArray[Any], ins: Instruction) -> None:
    if (mask != _EVERYONE).any():
        raise UnsupportedError(f"{ins.text}: a partial member mask")


@instruction("shfl")
def _shuffle(ins: Instruction, program: Program) -> Operate:
    flags, (kind,) = modifiers(ins, "sync up down bfly idx")
    modes = flags - {"sync"}
    if "sync" not in flags or len(modes) != 1 or kind != "b32":
        raise UnsupportedError(ins.text)
    mode = next(iter(modes))
    destination, *sources = operands(ins, 5)
    writes = [writer(part, k, program) for part, k in zip(items(destination), ("b32", "pred"), strict=False)]
    value, by, clamp, members = (reader(source, "b32", program) for source in sources)

    def run(m: Machine, lanes: Lanes) -> None:
        count = m.require_whole_warps(lanes, ins.text)
        _require_everyone(members(m, lanes), ins)
        grid = (count, 32)
        held = value(m, lanes).reshape(grid) if value(m, lanes).size > 1 else np.broadcast_to(value(m, lanes), grid)
        offset, limits = (
            np.broadcast_to(read(m, lanes).astype(np.int64).reshape(-1, 32) if read(m, lanes).size > 1
                            else read(m, lanes).astype(np.int64), grid)
            for read in (by, clamp)
        )  # fmt: skip
        source, valid = _shuffle_source(mode, offset, limits)
        results = (np.take_along_axis(held, source, 1).reshape(-1), valid.reshape(-1))
        for write, result in zip(writes, results, strict=False):
            write(m, lanes, result)

    return run


def _shuffle_source(mode: str, offset: NDArray[Any], limits: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return each lane's source and whether it lies in its segment (PTX ISA, shfl.sync, pseudo code)."""
    segment, clamp = (limits >> 8) & 31, limits & 31
    low, high = _LANE & segment, (_LANE & segment) | (clamp & ~segment)
    offset = offset & 31
    if mode == "up":
        source = _LANE - offset
        valid = source >= high
    else:
        source = {"down": _LANE + offset, "bfly": _LANE ^ offset, "idx": low | (offset & ~segment)}[mode]
        valid = source <= high
    return np.where(valid, source, _LANE), valid


@instruction("vote")
def _vote(ins: Instruction, program: Program) -> Operate:
    flags, (kind,) = modifiers(ins, "sync ballot any all")
    modes = flags - {"sync"}
    if "sync" not in flags or len(modes) != 1:
        raise UnsupportedError(ins.text)
    mode = next(iter(modes))
    destination, source, members = operands(ins, 3)
    write = writer(destination, kind, program)
    read, read_members = reader(source, "pred", program), reader(members, "b32", program)

    def run(m: Machine, lanes: Lanes) -> None:
        count = m.require_whole_warps(lanes, ins.text)
        _require_everyone(read_members(m, lanes), ins)
        votes = np.broadcast_to(read(m, lanes), count * 32).reshape(count, 32)
        if mode == "ballot":
            result = (votes.astype(np.uint64) << _LANE.astype(np.uint64)).sum(1).astype(np.uint32)
        else:
            result = votes.any(1) if mode == "any" else votes.all(1)
        write(m, lanes, np.repeat(result, 32))

    return run


@instruction("ldmatrix")
def _load_matrices(ins: Instruction, program: Program) -> Operate:
    """Four 8x8 matrices of 16-bit elements: lane i addresses row i % 8 of matrix i / 8."""
    flags, _ = modifiers(ins, "sync aligned m8n8 x4 trans shared")
    if not flags >= {"sync", "aligned", "m8n8", "x4", "shared"} or ins.modifiers[-1] != "b16":
        raise UnsupportedError(ins.text)
    destination, source = operands(ins, 2)
    writes = [writer(part, "b32", program) for part in items(destination)]
    where = address(source, program)

    def run(m: Machine, lanes: Lanes) -> None:
        count = m.require_whole_warps(lanes, ins.text)
        addresses = where(m, lanes)
        if m.counters is not None:
            m.counters.shared_access(ins.opcode, m.lanes[lanes] // 32, addresses, 16)
        rows = m.shared.load(m.block_of[lanes], addresses, 16, 2, ins.text).reshape(count, 4, 8, 8)
        matrices = rows.swapaxes(2, 3) if "trans" in flags else rows
        for i, write in enumerate(writes):
            pairs = np.ascontiguousarray(matrices[:, i]).reshape(-1, 2).view(np.uint32)
            write(m, lanes, pairs[:, 0])

    return run


def _places(rows: int, columns: int, place: Any) -> NDArray[np.int64]:
    """Return, for each element of a matrix in row-major order, its place among the lanes' values."""
    row, column = np.divmod(np.arange(rows * columns), columns)
    return place(row, column)


# PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type" and "mma.m16n8k32": where element (row, column)
# lies. The second is the first with a byte for a half, and twice as many of them in a register.
_A = _places(16, 16, lambda r, c: (r % 8 * 4 + c % 8 // 2) * 8 + c % 2 + 2 * (r // 8) + 4 * (c // 8))
_B = _places(16, 8, lambda r, c: (c * 4 + r % 8 // 2) * 4 + r % 2 + 2 * (r // 8))
_A_BYTES = _places(16, 32, lambda r, c: (r % 8 * 4 + c % 16 // 4) * 16 + c % 4 + 4 * (r // 8) + 8 * (c // 16))
_B_BYTES = _places(32, 8, lambda r, c: (c * 4 + r % 16 // 4) * 8 + r % 4 + 4 * (r // 16))
_C = _places(16, 8, lambda r, c: (r % 8 * 4 + c // 2) * 4 + c % 2 + 2 * (r // 8))
_C_BACK = np.argsort(_C)
# Shape, order, and types of the sum, of both factors and of what is added -> where the factors lie.
_PRODUCTS: dict[tuple[str, ...], tuple[NDArray[np.int64], NDArray[np.int64]]] = {
    ("m16n8k16", "row", "col", "f32", "bf16", "bf16", "f32"): (_A, _B),
    ("m16n8k16", "row", "col", "f32", "f16", "f16", "f32"): (_A, _B),
    ("m16n8k32", "row", "col", "s32", "s8", "s8", "s32"): (_A_BYTES, _B_BYTES),
}


def _numbers(registers: NDArray[Any], kind: str) -> NDArray[Any]:
    """Return what registers hold, side by side."""
    return registers.view(np.int8) if kind == "s8" else HALVES[kind][0](registers.view(np.uint16))


@instruction("mma")
def _mma(ins: Instruction, program: Program) -> Operate:
    """Add a b to c, 16 rows times 8 columns; the sum is made in float64, then rounded, or wrapped to an integer."""
    if ins.modifiers[:2] != ("sync", "aligned") or ins.modifiers[2:] not in _PRODUCTS:
        raise UnsupportedError(ins.text)
    a_places, b_places = _PRODUCTS[ins.modifiers[2:]]
    factors, kind = ins.modifiers[-2], ins.modifiers[-1]
    k = len(b_places) // 8
    destination, a, b, c = operands(ins, 4)
    if [len(items(x)) for x in (destination, a, b, c)] != [4, 4, 2, 4]:
        raise UnsupportedError(ins.text)
    reads_a, reads_b = _readers(a, "b32", program), _readers(b, "b32", program)
    reads_c = _readers(c, kind, program)
    writes = [writer(part, kind, program) for part in items(destination)]

    def run(m: Machine, lanes: Lanes) -> None:
        count = m.require_whole_warps(lanes, ins.text)
        left = _numbers(_gather(m, lanes, reads_a), factors).reshape(count, -1)[:, a_places].reshape(count, 16, k)
        right = _numbers(_gather(m, lanes, reads_b), factors).reshape(count, -1)[:, b_places].reshape(count, k, 8)
        sums = _gather(m, lanes, reads_c).reshape(count, 128)[:, _C].reshape(count, 16, 8)
        wide = left.astype(np.float64) @ right.astype(np.float64) + sums
        result = wide.astype(np.float32) if kind == "f32" else wide.astype(np.int64).astype(np.int32)
        values = result.reshape(count, 128)[:, _C_BACK].reshape(-1, 4)
        for i, write in enumerate(writes):
            write(m, lanes, np.ascontiguousarray(values[:, i]))

    return run


def _readers(operand: Operand, kind: str, program: Program) -> list[Read]:
    if not isinstance(operand, Vector) or not all(isinstance(part, Register) for part in operand.items):
        raise UnsupportedError(f"{operand} in mma")
    return [reader(part, kind, program) for part in operand.items]


def _gather(m: Machine, lanes: Lanes, reads: list[Read]) -> NDArray[Any]:
    """Return the registers of each lane side by side: [lanes, registers]."""
    return np.stack([read(m, lanes) for read in reads], 1)
