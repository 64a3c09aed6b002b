"""From an instruction to a function that runs it: operands, types and modifiers are settled once, strictly."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from tools.ptx_simulator.errors import UnsupportedError
from tools.ptx_simulator.machine import Lanes, Machine, Operate, storage_type
from tools.ptx_simulator.program import Address, Immediate, Instruction, Name, Operand, Program, Register, Vector

Values = NDArray[np.generic]
Read = Callable[[Machine, Lanes], Values]
Write = Callable[[Machine, Lanes, Values], None]
Decoder = Callable[[Instruction, Program], Operate]

# PTX type -> numpy type. Half types are held as their bits.
TYPES = {
    "b8": "u1", "u8": "u1", "s8": "i1", "b16": "u2", "u16": "u2", "s16": "i2", "b32": "u4", "u32": "u4", "s32": "i4",
    "f32": "f4", "b64": "u8", "u64": "u8", "s64": "i8", "pred": "?", "f16": "u2", "bf16": "u2", "bf16x2": "u4",
    "f16x2": "u4",
}  # fmt: skip
CONTROL = frozenset({"bra", "bar", "ret", "exit"})

_decoders: dict[str, Decoder] = {}


def instruction(*opcodes: str) -> Callable[[Decoder], Decoder]:
    """Register the decoder of some opcodes."""

    def register(decoder: Decoder) -> Decoder:
        for opcode in opcodes:
            _decoders[opcode] = decoder
        return decoder

    return register


def decode(program: Program) -> tuple[Operate | None, ...]:
    """Return one function per instruction; None for control flow.

    Raises:
        UnsupportedError: An opcode or a modifier is not known.
    """
    return tuple(_decode_one(ins, program) for ins in program.instructions)


def _decode_one(ins: Instruction, program: Program) -> Operate | None:
    if ins.opcode in CONTROL:
        known = {"bra": {(), ("uni",)}, "bar": {("sync",)}, "ret": {()}, "exit": {()}}[ins.opcode]
        plain_barrier = ins.opcode != "bar" or ins.operands == (Immediate(0),)
        if ins.modifiers not in known or not plain_barrier:
            raise UnsupportedError(ins.text)
        return None
    decoder = _decoders.get(ins.opcode)
    if decoder is None:
        raise UnsupportedError(ins.text)
    return decoder(ins, program)


def modifiers(ins: Instruction, allowed: str, num_types: int = 1) -> tuple[frozenset[str], tuple[str, ...]]:
    """Split modifiers into flags, all of which must be in `allowed`, and the types that end them."""
    cut = len(ins.modifiers) - num_types
    flags, types = frozenset(ins.modifiers[:cut]), ins.modifiers[cut:]
    if cut < 0 or not flags <= set(allowed.split()) or not all(t in TYPES for t in types):
        raise UnsupportedError(ins.text)
    return flags, types


def operands(ins: Instruction, *counts: int) -> tuple[Operand, ...]:
    """Return the operands, of which there must be one of these numbers."""
    if len(ins.operands) not in counts:
        raise UnsupportedError(ins.text)
    return ins.operands


def constant(value: int, kind: str) -> Values:
    """Return an integer literal as an array of one element of a PTX type, wrapped as PTX wraps it."""
    bits = np.dtype(TYPES[kind]).itemsize * 8
    return np.array([value % (1 << bits)], f"u{bits // 8}").view(TYPES[kind])


def reader(operand: Operand, kind: str, program: Program, *, narrow: bool = False) -> Read:
    """Return a function that reads an operand as a PTX type.

    Args:
        narrow: A wider register may be read, its low bits (as st and cvt allow).
    """
    dtype = np.dtype(TYPES[kind])
    if isinstance(operand, Immediate):
        if operand.is_float_bits and kind not in ("f32", "b32"):
            raise UnsupportedError(f"a float literal as {kind}")
        value = constant(operand.value, "b32").view(dtype) if operand.is_float_bits else constant(operand.value, kind)
        if kind == "f32" and not operand.is_float_bits:
            raise UnsupportedError(f"an integer literal as {kind}")
        return lambda _m, _lanes: value
    if isinstance(operand, Name):
        return _name_reader(operand.name, kind, program)
    if not isinstance(operand, Register):
        raise UnsupportedError(f"{operand} as {kind}")
    return _register_reader(operand, dtype, program, narrow)


def _name_reader(name: str, kind: str, program: Program) -> Read:
    if name.startswith("%"):
        if kind not in ("b32", "u32"):
            raise UnsupportedError(f"{name} as {kind}")
        return lambda m, lanes: m.special[name][lanes]
    if name not in {v.name for v in program.shared}:
        raise UnsupportedError(f"the name {name} as a value")
    return lambda m, _lanes: constant(m.addresses_of[name], kind)


def _register_reader(register: Register, dtype: np.dtype, program: Program, narrow: bool) -> Read:
    name = register.name
    held = np.dtype(storage_type(program.registers[name]))
    if dtype == np.bool_:
        if held != np.bool_:
            raise UnsupportedError(f"{name} as a predicate")
        return (lambda m, lanes: ~m.registers[name][lanes]) if register.negated else (
            lambda m, lanes: m.registers[name][lanes]
        )  # fmt: skip
    if held.itemsize == dtype.itemsize and held != np.bool_:
        return lambda m, lanes: m.registers[name][lanes].view(dtype)
    if narrow and held.itemsize > dtype.itemsize:
        unsigned = f"u{dtype.itemsize}"
        return lambda m, lanes: m.registers[name][lanes].astype(unsigned).view(dtype)
    raise UnsupportedError(f"{name} ({program.registers[name]}) as {dtype}")


def writer(operand: Operand, kind: str, program: Program, *, extend: bool = False) -> Write:
    """Return a function that writes values of a PTX type to a register; `_` drops them.

    Args:
        extend: The register may be wider and gets the value extended by its sign (as ld and cvt do).
    """
    if operand == Name("_"):
        return lambda _m, _lanes, _values: None
    if not isinstance(operand, Register) or operand.negated:
        raise UnsupportedError(f"{operand} as a destination")
    name, dtype = operand.name, np.dtype(TYPES[kind])
    held = np.dtype(storage_type(program.registers[name]))
    same = held.itemsize == dtype.itemsize and (held == np.bool_) == (dtype == np.bool_)
    if not same and not (extend and held.itemsize > dtype.itemsize and dtype.kind in "iu"):
        raise UnsupportedError(f"{kind} into {name} ({program.registers[name]})")

    def write(m: Machine, lanes: Lanes, values: Values) -> None:
        assert values.dtype == dtype, (kind, values.dtype)
        if not same:
            values = values.astype(f"{dtype.kind}{held.itemsize}")
        m.registers[name][lanes] = values.view(held)

    return write


def items(operand: Operand) -> tuple[Operand, ...]:
    """Return the parts of a vector, or the operand itself."""
    return operand.items if isinstance(operand, Vector) else (operand,)


def address(operand: Operand, program: Program) -> Callable[[Machine, Lanes], NDArray[np.int64]]:
    """Return a function that evaluates `[base + offset]` for every lane."""
    if not isinstance(operand, Address):
        raise UnsupportedError(f"{operand} as an address")
    offset, base = operand.offset, operand.base
    if isinstance(base, Register):
        kind = "u" + program.registers[base.name][1:]
        read = reader(base, kind, program)
        return lambda m, lanes: read(m, lanes).astype(np.int64) + offset
    if isinstance(base, Name) and base.name in {v.name for v in program.shared}:
        name = base.name
        return lambda m, lanes: np.full(m.size(lanes), m.addresses_of[name] + offset)
    raise UnsupportedError(f"the address {operand}")
