"""Instructions that compute: arithmetic, logic, comparison (PTX ISA 9.0, sections 9.7.1 to 9.7.8)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tools.ptx_simulator.decode import TYPES, instruction, modifiers, operands, reader, writer
from tools.ptx_simulator.errors import UnsupportedError
from tools.ptx_simulator.machine import Lanes, Machine, Operate
from tools.ptx_simulator.program import Immediate, Instruction, Program

Compute = Callable[..., Any]


def _apply(ins: Instruction, program: Program, kinds: list[str], result: str, compute: Compute) -> Operate:
    """Build: read the sources as `kinds`, compute, write as `result`."""
    destination, *sources = operands(ins, len(kinds) + 1)
    reads = [reader(source, kind, program) for source, kind in zip(sources, kinds, strict=True)]
    write = writer(destination, result, program)
    dtype = TYPES[result]

    def run(m: Machine, lanes: Lanes) -> None:
        values = compute(*[read(m, lanes) for read in reads])
        write(m, lanes, np.asarray(values).astype(dtype, copy=False))

    return run


_TWO: dict[str, tuple[Compute, str]] = {
    "add": (np.add, "rn ftz"), "sub": (np.subtract, "rn ftz"), "and": (np.bitwise_and, ""),
    "or": (np.bitwise_or, ""), "xor": (np.bitwise_xor, ""),
}  # fmt: skip


@instruction(*_TWO)
def _two(ins: Instruction, program: Program) -> Operate:
    compute, allowed = _TWO[ins.opcode]
    _, (kind,) = modifiers(ins, allowed)
    return _apply(ins, program, [kind, kind], kind, compute)


@instruction("min", "max")
def _extreme(ins: Instruction, program: Program) -> Operate:
    """Of a number and a NaN, the number, as IEEE 754-2008 has it."""
    _, (kind,) = modifiers(ins, "ftz")
    compute = np.fmin if ins.opcode == "min" else np.fmax
    return _apply(ins, program, [kind, kind], kind, compute)


_ONE: dict[str, tuple[Compute, str]] = {
    "neg": (np.negative, "ftz"), "abs": (np.abs, "ftz"), "not": (np.invert, ""),
    "ex2": (np.exp2, "approx ftz"), "lg2": (np.log2, "approx ftz"), "sqrt": (np.sqrt, "approx rn ftz"),
    "rcp": (lambda a: np.float32(1) / a, "approx rn ftz"), "tanh": (np.tanh, "approx"),
    "rsqrt": (lambda a: np.float32(1) / np.sqrt(a), "approx ftz"),
    "popc": (np.bitwise_count, ""),
    "clz": (lambda a: 32 - np.ceil(np.log2(a.astype(np.float64) + 1)), ""),
}  # fmt: skip


@instruction(*_ONE)
def _one(ins: Instruction, program: Program) -> Operate:
    compute, allowed = _ONE[ins.opcode]
    _, (kind,) = modifiers(ins, allowed)
    if ins.opcode == "clz" and kind != "b32":
        raise UnsupportedError(ins.text)
    result = "u32" if ins.opcode in ("popc", "clz") else kind
    return _apply(ins, program, [kind], result, compute)


@instruction("mul")
def _mul(ins: Instruction, program: Program) -> Operate:
    flags, (kind,) = modifiers(ins, "lo hi wide rn ftz")
    if kind.startswith("f"):
        if flags & {"lo", "hi", "wide"}:
            raise UnsupportedError(ins.text)
        return _apply(ins, program, [kind, kind], kind, np.multiply)
    if len(flags) != 1 or not flags <= {"lo", "hi", "wide"}:
        raise UnsupportedError(ins.text)
    if "lo" in flags:
        return _apply(ins, program, [kind, kind], kind, np.multiply)
    bits = int(kind[1:])
    if bits == 64:
        raise UnsupportedError(ins.text)
    double = f"{kind[0]}{2 * bits}"
    wide = TYPES[double]
    if "wide" in flags:
        return _apply(ins, program, [kind, kind], double, lambda a, b: a.astype(wide) * b.astype(wide))
    return _apply(ins, program, [kind, kind], kind, lambda a, b: a.astype(wide) * b.astype(wide) >> bits)


@instruction("mad")
def _mad(ins: Instruction, program: Program) -> Operate:
    flags, (kind,) = modifiers(ins, "lo wide")
    if len(flags) != 1 or kind.startswith("f"):
        raise UnsupportedError(ins.text)
    result = f"{kind[0]}{2 * int(kind[1:])}" if "wide" in flags else kind
    wide = TYPES[result]
    return _apply(ins, program, [kind, kind, result], result, lambda a, b, c: a.astype(wide) * b.astype(wide) + c)


@instruction("fma")
def _fma(ins: Instruction, program: Program) -> Operate:
    flags, (kind,) = modifiers(ins, "rn ftz")
    if "rn" not in flags or kind != "f32":
        raise UnsupportedError(ins.text)
    # The product of two float32 is exact in float64, so one rounding is all that a fused one does.
    return _apply(ins, program, [kind] * 3, kind, lambda a, b, c: a.astype(np.float64) * b + c)


def _truncated_quotient(a: Any, b: Any) -> Any:
    if a.dtype.kind == "u":
        return a // b
    quotient = np.abs(a.astype(np.int64)) // np.abs(b.astype(np.int64))
    return np.where((a < 0) != (b < 0), -quotient, quotient)


@instruction("div", "rem")
def _divide(ins: Instruction, program: Program) -> Operate:
    _, (kind,) = modifiers(ins, "rn approx full ftz" if ins.opcode == "div" else "")
    if kind.startswith("f"):
        return _apply(ins, program, [kind, kind], kind, np.divide)
    if ins.opcode == "div":
        return _apply(ins, program, [kind, kind], kind, _truncated_quotient)
    return _apply(ins, program, [kind, kind], kind, lambda a, b: a - _truncated_quotient(a, b) * b)


@instruction("shl", "shr")
def _shift(ins: Instruction, program: Program) -> Operate:
    _, (kind,) = modifiers(ins, "")
    bits = int(kind[1:])
    if ins.opcode == "shl":
        return _apply(ins, program, [kind, "u32"], kind,
                      lambda a, n: np.where(n < bits, a << np.minimum(n, bits - 1).astype(a.dtype), 0))  # fmt: skip
    if kind.startswith("s"):
        return _apply(ins, program, [kind, "u32"], kind, lambda a, n: a >> np.minimum(n, bits - 1).astype(a.dtype))
    return _apply(ins, program, [kind, "u32"], kind,
                  lambda a, n: np.where(n < bits, a >> np.minimum(n, bits - 1).astype(a.dtype), 0))  # fmt: skip


@instruction("shf")
def _funnel_shift(ins: Instruction, program: Program) -> Operate:
    flags, (kind,) = modifiers(ins, "l r wrap")
    if "wrap" not in flags or len(flags) != 2 or kind != "b32":
        raise UnsupportedError(ins.text)
    left = "l" in flags

    def compute(low: Any, high: Any, count: Any) -> Any:
        both = (high.astype(np.uint64) << 32) | low
        by = (count & 31).astype(np.uint64)
        return (both << by) >> 32 if left else both >> by

    return _apply(ins, program, ["u32", "u32", "u32"], "b32", lambda a, b, c: compute(a, b, c).astype(np.uint32))


@instruction("bfe")
def _extract_bits(ins: Instruction, program: Program) -> Operate:
    _, (kind,) = modifiers(ins, "")
    if kind not in ("u32", "s32"):
        raise UnsupportedError(ins.text)

    def compute(a: Any, start: Any, length: Any) -> Any:
        start, length = (start & 255).astype(np.int64), (length & 255).astype(np.int64)
        value = (a.astype(np.int64) >> np.minimum(start, 63)) & ((np.int64(1) << np.minimum(length, 32)) - 1)
        if kind == "u32":
            return value
        sign = np.int64(1) << np.maximum(np.minimum(length, 32) - 1, 0)
        return np.where(length > 0, (value ^ sign) - sign, 0)

    return _apply(ins, program, [kind, "u32", "u32"], kind, compute)


@instruction("bfi")
def _insert_bits(ins: Instruction, program: Program) -> Operate:
    _, (kind,) = modifiers(ins, "")
    if kind not in ("b32", "b64"):
        raise UnsupportedError(ins.text)
    source = f"u{kind[1:]}"

    def compute(a: Any, b: Any, start: Any, length: Any) -> Any:
        start, length = (start & 255).astype(np.uint64), (length & 255).astype(np.uint64)
        if (start + length > 64).any() or (length > 63).any():
            raise UnsupportedError(f"{ins.text}: beyond the register")
        mask = ((np.uint64(1) << length) - np.uint64(1)) << start
        return (b.astype(np.uint64) & ~mask) | ((a.astype(np.uint64) << start) & mask)

    return _apply(ins, program, [source, source, "u32", "u32"], kind, compute)


@instruction("prmt")
def _permute_bytes(ins: Instruction, program: Program) -> Operate:
    _, (kind,) = modifiers(ins, "")
    if kind != "b32":
        raise UnsupportedError(ins.text)

    def compute(a: Any, b: Any, selector: Any) -> Any:
        if (selector & 0x8888).any():
            raise UnsupportedError(f"{ins.text}: replicates signs")
        pool = np.stack(np.broadcast_arrays(a, b), 1).view(np.uint8)
        if (selector == selector[0]).all():  # nearly always, and much faster
            bytes_ = pool[:, [int(selector[0]) >> 4 * i & 7 for i in range(4)]]
        else:
            bytes_ = np.take_along_axis(pool, (selector[:, None] >> (4 * np.arange(4))).astype(np.int64) & 7, 1)
        return np.ascontiguousarray(bytes_).view(np.uint32)[:, 0]

    return _apply(ins, program, ["u32"] * 3, kind, compute)


@instruction("lop3")
def _logic_of_three(ins: Instruction, program: Program) -> Operate:
    _, (kind,) = modifiers(ins, "")
    table = operands(ins, 5)[4]
    if kind != "b32" or not isinstance(table, Immediate):
        raise UnsupportedError(ins.text)

    def compute(a: Any, b: Any, c: Any, _: Any) -> Any:
        out = np.uint32(0)
        for i in range(8):
            if table.value >> i & 1:
                out = out | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c))
        return out

    return _apply(ins, program, ["u32"] * 4, kind, compute)


_COMPARE = {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal,
            "ne": np.not_equal}  # fmt: skip


@instruction("setp")
def _compare(ins: Instruction, program: Program) -> Operate:
    """`setp.lt.f32`; with a u (ltu) true where a side is NaN; `.and` or `.or` join another predicate."""
    flags, (kind,) = modifiers(ins, "lt le gt ge eq ne ltu leu gtu geu equ neu ftz and or")
    relation = ins.modifiers[0]
    compare = _COMPARE.get(relation[:2])
    joins = flags & {"and", "or"}
    if compare is None or len(flags - {"ftz"}) != 1 + len(joins) or len(joins) > 1:
        raise UnsupportedError(ins.text)
    unordered = relation.endswith("u")

    def compute(a: Any, b: Any, *other: Any) -> Any:
        held = compare(a, b)
        if kind == "f32":
            nan = np.isnan(a) | np.isnan(b)
            held = held | nan if unordered else held & ~nan
        if joins:
            return held & other[0] if "and" in joins else held | other[0]
        return held

    return _apply(ins, program, [kind, kind] + ["pred"] * len(joins), "pred", compute)


@instruction("selp")
def _select(ins: Instruction, program: Program) -> Operate:
    _, (kind,) = modifiers(ins, "")
    return _apply(ins, program, [kind, kind, "pred"], kind, lambda a, b, p: np.where(p, a, b))
