"""The text of a PTX module, taken apart: parameters, registers, shared variables, instructions.

Follows the syntax of NVIDIA's PTX ISA 9.0, chapter 4, as far as compilers emit it for kernels without calls,
local memory or scopes; those are refused (a local array means that a kernel indexes registers at run time).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass

from tools.ptx_simulator.errors import UnsupportedError


@dataclass(frozen=True)
class Register:
    """`%r1`, or as a predicate `!%p1`."""

    name: str
    negated: bool = False


@dataclass(frozen=True)
class Immediate:
    """A number: `0f3F800000` is the bits of a float, anything else an integer."""

    value: int
    is_float_bits: bool = False


@dataclass(frozen=True)
class Name:
    """A label, a parameter, a shared variable or (with %) a special register."""

    name: str


@dataclass(frozen=True)
class Address:
    """`[%rd1+16]`."""

    base: Register | Name | None
    offset: int


@dataclass(frozen=True)
class Vector:
    """`{a, b}`, or the two results of `a|b`."""

    items: tuple[Operand, ...]


Operand = Register | Immediate | Name | Address | Vector


@dataclass(frozen=True)
class Instruction:
    """`@%p1 add.ftz.f32 a, b, c`: opcode add, modifiers (ftz, f32), guard p1."""

    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Register | None
    text: str


@dataclass(frozen=True)
class Variable:
    """A static shared array; the dynamic one has size 0 and comes last."""

    name: str
    align: int
    size: int


@dataclass(frozen=True)
class Program:
    """One entry point.

    Attributes:
        parameters: (name, type) in order.
        registers: Name -> type of declaration, for example "b32"; expanded from `%r<100>`.
        labels: Name -> index of the instruction it stands before.
    """

    entry: str
    parameters: tuple[tuple[str, str], ...]
    registers: dict[str, str]
    shared: tuple[Variable, ...]
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]


_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_PARAMETER = re.compile(r"\.param\s+\.([bfsu]\d+)\s+(?:\.ptr\s+(?:\.global\s+)?\.align\s+\d+\s+)?(\w+)$")
_SHARED = re.compile(r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.([bfsu])(\d+)\s+(\w+)(?:\[(\d*)\])?$")
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(%\w+)<(\d+)>$")
_INSTRUCTION = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.S)
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")
_LABEL = re.compile(r"([$\w]+):\s*")
# The only scope that the compiler opens: for the upper half of a register; the lower half goes into a new register.
_UPPER_HALF = re.compile(r"\{\s*\.reg \.(b16|b32) tmp;\s*(mov\.b(?:32|64)) \{tmp, (%\w+)\}, (%\w+);\s*\}")
_LOWER_HALF = {"%lower_b16": "b16", "%lower_b32": "b32"}


@functools.lru_cache(maxsize=64)
def parse(ptx: str, entry: str) -> Program:
    """Take one `.entry` out of a module.

    Raises:
        UnsupportedError: It uses syntax that is not known here.
        ValueError: There is no such entry.
    """
    text = _UPPER_HALF.sub(r"\2 {%lower_\1, \3}, \4;", _COMMENT.sub("", ptx))
    head = re.search(r"\.entry\s+" + re.escape(entry) + r"\s*\((.*?)\)(.*?)\{", text, re.S)
    if head is None:
        raise ValueError(f"no kernel {entry} in this module")
    outer = text[: text.index(".entry")]
    shared = [_shared(s) for s in _statements(outer) if ".shared" in s]
    registers = dict(_LOWER_HALF)
    labels: dict[str, int] = {}
    instructions: list[Instruction] = []
    for statement in _statements(_body(text, head.end())):
        rest = statement
        while label := _LABEL.match(rest):
            labels[label[1]] = len(instructions)
            rest = rest[label.end() :]
        if rest.startswith("."):
            _directive(rest, registers, shared)
        elif rest:
            instructions.append(_instruction(rest))
    parameters = tuple(_parameter(p.strip()) for p in head[1].split(",") if p.strip())
    return Program(entry, parameters, registers, tuple(shared), tuple(instructions), labels)


def _body(text: str, start: int) -> str:
    depth = 1
    for brace in re.finditer(r"[{}]", text[start:]):
        depth += 1 if brace[0] == "{" else -1
        if not depth:
            return text[start : start + brace.start()]
    raise UnsupportedError("a kernel without an end")


def _statements(text: str) -> Iterator[str]:
    for statement in text.split(";"):
        yield statement.strip()


def _parameter(text: str) -> tuple[str, str]:
    found = _PARAMETER.match(text)
    if found is None:
        raise UnsupportedError(f"parameter: {text}")
    return found[2], found[1]


def _shared(text: str) -> Variable:
    found = _SHARED.search(text)
    if found is None:
        raise UnsupportedError(f"shared variable: {text}")
    element_bytes = int(found[3]) // 8
    dynamic = ".extern" in text
    count = 0 if dynamic else int(found[5] or 1)
    return Variable(found[4], int(found[1] or element_bytes), element_bytes * count)


def _directive(statement: str, registers: dict[str, str], shared: list[Variable]) -> None:
    if found := _REGISTERS.match(statement):
        for i in range(int(found[3])):
            registers[f"{found[2]}{i}"] = found[1]
    elif statement.startswith(".shared"):
        shared.append(_shared(statement))
    elif not statement.startswith((".loc ", ".pragma ")):
        raise UnsupportedError(f"directive: {statement}")


def _instruction(text: str) -> Instruction:
    found = _INSTRUCTION.match(text)
    if found is None:
        raise UnsupportedError(f"statement: {text}")
    negated, guard, mnemonic, rest = found.groups()
    opcode, *modifiers = mnemonic.replace("::", "__").split(".")
    return Instruction(
        opcode,
        tuple(modifiers),
        tuple(_operand(part) for part in _OPERAND.findall(rest)),
        Register(guard, negated == "!") if guard else None,
        re.sub(r"\s+", " ", text),
    )


@functools.lru_cache(maxsize=65536)
def _operand(text: str) -> Operand:
    if text.startswith("{"):
        return Vector(tuple(_operand(part.strip()) for part in text[1:-1].split(",")))
    if text.startswith("["):
        return _address(text[1:-1].strip())
    if "|" in text:
        return Vector(tuple(_operand(part) for part in text.split("|")))
    if text.startswith("!"):
        return Register(text[1:], negated=True)
    if re.fullmatch(r"%(tid|ntid|ctaid|nctaid)\.[xyz]|%laneid", text):
        return Name(text)
    if text.startswith("%"):
        return Register(text)
    if re.fullmatch(r"0f[0-9A-Fa-f]{8}", text):
        return Immediate(int(text[2:], 16), is_float_bits=True)
    if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)U?", text):
        return Immediate(int(text.rstrip("U"), 0))
    if re.fullmatch(r"[$A-Za-z_][$\w]*", text):
        return Name(text)
    raise UnsupportedError(f"operand: {text}")


def _address(text: str) -> Address:
    found = re.fullmatch(r"([%$\w]+)\s*(?:\+\s*(-?\w+))?", text)
    if found is None:
        raise UnsupportedError(f"address: [{text}]")
    base = _operand(found[1])
    if isinstance(base, Immediate):
        return Address(None, base.value + int(found[2] or "0", 0))
    assert isinstance(base, Register | Name)
    return Address(base, int(found[2] or "0", 0))
