"""Instructions that touch memory: ld, st, cp.async, atom, red, fences (PTX ISA 9.0, sections 9.7.9 and 9.7.13)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tools.ptx_simulator.decode import TYPES, address, instruction, items, modifiers, operands, reader, writer
from tools.ptx_simulator.errors import UnsupportedError
from tools.ptx_simulator.machine import Lanes, Machine, Operate
from tools.ptx_simulator.memory import Integers
from tools.ptx_simulator.program import Address, Immediate, Instruction, Name, Operand, Program

_HINTS = "nc volatile relaxed gpu cta L1__no_allocate L2__128B v2 v4"
Words = NDArray[np.unsignedinteger]


def _space(ins: Instruction, flags: frozenset[str]) -> str:
    space = flags & {"global", "shared"}
    if len(space) != 1:
        raise UnsupportedError(f"{ins.text}: no state space (a generic address)")
    return next(iter(space))


def _count(m: Machine, ins: Instruction, lanes: Lanes, addresses: Integers, width: int, space: str) -> None:
    if m.counters is not None:
        tally = m.counters.global_access if space == "global" else m.counters.shared_access
        tally(ins.opcode, m.lanes[lanes] // 32, addresses, width)


def _read(m: Machine, space: str, lanes: Lanes, addresses: Integers, width: int, item: int, text: str) -> Words:
    if space == "global":
        m.touch_global(lanes, addresses, text)
        return m.memory.load(addresses, width, item, text)
    return m.shared.load(m.block_of[lanes], addresses, width, item, text)


def _write(m: Machine, space: str, lanes: Lanes, addresses: Integers, values: Words, text: str) -> None:
    if space == "global":
        m.touch_global(lanes, addresses, text, write=True)
        m.memory.store(addresses, values, text)
    else:
        m.shared.store(m.block_of[lanes], addresses, values, text)


def _shape(ins: Instruction, value: int) -> tuple[str, str, tuple[Operand, ...], int]:
    """Take `ld` or `st` apart: state space, type, the registers (operand number `value`), bytes of one of them."""
    flags, (kind,) = modifiers(ins, f"global shared {_HINTS}")
    parts = items(operands(ins, 2)[value])
    if len(parts) != (4 if "v4" in flags else 2 if "v2" in flags else 1):
        raise UnsupportedError(ins.text)
    return _space(ins, flags), kind, parts, np.dtype(TYPES[kind]).itemsize


@instruction("ld")
def _load(ins: Instruction, program: Program) -> Operate:
    if ins.modifiers[0] == "param":
        return _load_parameter(ins, program)
    space, kind, parts, item = _shape(ins, 0)
    width = item * len(parts)
    where = address(ins.operands[1], program)
    writes = [writer(part, kind, program, extend=True) for part in parts]

    def run(m: Machine, lanes: Lanes) -> None:
        addresses = where(m, lanes)
        _count(m, ins, lanes, addresses, width, space)
        values = _read(m, space, lanes, addresses, width, item, ins.text)
        for i, write in enumerate(writes):
            write(m, lanes, np.ascontiguousarray(values[:, i]).view(TYPES[kind]))

    return run


def _load_parameter(ins: Instruction, program: Program) -> Operate:
    _, (kind,) = modifiers(ins, "param")
    destination, source = operands(ins, 2)
    if not isinstance(source, Address) or not isinstance(source.base, Name) or source.offset:
        raise UnsupportedError(ins.text)
    name, write = source.base.name, writer(destination, kind, program, extend=True)
    return lambda m, lanes: write(m, lanes, m.arguments[name].view(TYPES[kind]))


@instruction("st")
def _store(ins: Instruction, program: Program) -> Operate:
    space, kind, parts, item = _shape(ins, 1)
    where = address(ins.operands[0], program)
    reads = [reader(part, kind, program, narrow=True) for part in parts]

    def run(m: Machine, lanes: Lanes) -> None:
        addresses = where(m, lanes)
        _count(m, ins, lanes, addresses, item * len(parts), space)
        values = np.empty((len(addresses), len(reads)), f"u{item}")
        for i, read in enumerate(reads):
            values[:, i] = read(m, lanes).view(values.dtype)
        _write(m, space, lanes, addresses, values, ins.text)

    return run


@instruction("griddepcontrol")
def _dependent_launch(ins: Instruction, _: Program) -> Operate:
    """Wait for the kernels before this one, or let the next one begin: that it may is always assumed."""
    operands(ins, 0)
    if ins.modifiers == ("launch_dependents",):
        return lambda _m, _lanes: None
    if ins.modifiers != ("wait",):
        raise UnsupportedError(ins.text)

    def wait(m: Machine, lanes: Lanes) -> None:
        if m.is_ahead is not None:
            m.is_ahead[lanes] = False

    return wait


@instruction("cp")
def _copy(ins: Instruction, program: Program) -> Operate:
    if ins.modifiers == ("async", "commit_group"):
        return _commit
    if ins.modifiers == ("async", "wait_group"):
        (pending,) = operands(ins, 1)
        assert isinstance(pending, Immediate)
        return lambda m, lanes: _land(m, lanes, pending.value)
    return _copy_async(ins, program)


def _commit(m: Machine, lanes: Lanes) -> None:
    m.commits[lanes] += 1


def _copy_async(ins: Instruction, program: Program) -> Operate:
    """Issue a copy: until it is waited for, its destination reads as NaN."""
    flags, _ = modifiers(ins, "async ca cg shared global L2__128B", num_types=0)
    destination, source, size, *taken = operands(ins, 3, 4)
    assert isinstance(size, Immediate)
    if not flags >= {"async", "shared", "global"} or ("cg" in flags and size.value != 16):
        raise UnsupportedError(ins.text)
    width = size.value
    to, at = address(destination, program), address(source, program)
    read_taken = reader(taken[0], "u32", program) if taken else None

    def run(m: Machine, lanes: Lanes) -> None:
        targets, sources = to(m, lanes), at(m, lanes)
        blocks, numbers = m.block_of[lanes], m.lanes[lanes]
        used = np.full(len(targets), width)
        if read_taken is not None:
            used[:] = read_taken(m, lanes)
        if not np.isin(used, (0, width)).all():
            raise UnsupportedError(f"{ins.text}: copies a part and fills the rest")
        whole = used > 0
        if whole.any():
            m.touch_global(numbers[whole], sources[whole], ins.text)
            m.memory.load(sources[whole], width, width // 4 if width == 4 else 4, ins.text)  # checks the addresses
            _count(m, ins, numbers[whole], sources[whole], width, "global")
        m.shared.poison(blocks, targets, width, ins.text)
        sources = np.where(whole, sources, 0)
        m.copies.append((numbers, targets, sources, np.full(len(targets), width), m.commits[lanes].copy()))

    return run


def _land(m: Machine, lanes: Lanes, pending: int) -> None:
    """Let the copies land that these lanes committed before their last `pending` groups."""
    waiting = np.zeros(len(m.lanes), np.bool_)
    waiting[lanes] = True
    flying: list[tuple[Integers, ...]] = []
    for copy in m.copies:
        numbers, targets, sources, widths, groups = copy
        due = waiting[numbers] & (groups < m.commits[numbers] - pending)
        if due.any():
            _write_copy(m, numbers[due], targets[due], sources[due], int(widths[0]))
        if not due.all():
            flying.append(tuple(part[~due] for part in copy))
    m.copies = flying


def _write_copy(m: Machine, numbers: Integers, targets: Integers, sources: Integers, width: int) -> None:
    values = np.zeros((len(targets), width // 4), np.uint32)
    whole = sources > 0
    if whole.any():
        values[whole] = m.memory.load(sources[whole], width, 4, "cp.async")
    m.shared.store(m.block_of[numbers], targets, values, "cp.async")


_ATOMS: dict[str, Callable[..., Any]] = {
    "add": lambda old, x: old + x, "max": max, "min": min, "or": lambda old, x: old | x,
    "and": lambda old, x: old & x, "exch": lambda _old, x: x,
}  # fmt: skip


@instruction("atom", "red")
def _atomic(ins: Instruction, program: Program) -> Operate:
    """One lane after another; a kernel whose result depends on their order differs between orders of warps."""
    flags, (kind,) = modifiers(ins, "global shared relaxed gpu cta " + " ".join(_ATOMS))
    functions = flags & _ATOMS.keys()
    space = _space(ins, flags)
    if len(functions) != 1:
        raise UnsupportedError(ins.text)
    function = _ATOMS[next(iter(functions))]
    given = ins.operands if ins.opcode == "atom" else (Name("_"), *ins.operands)
    destination, place, operand = given
    item = np.dtype(TYPES[kind]).itemsize
    write, where, read = writer(destination, kind, program), address(place, program), reader(operand, kind, program)

    def run(m: Machine, lanes: Lanes) -> None:
        addresses, values = where(m, lanes), np.broadcast_to(read(m, lanes), m.size(lanes))
        numbers = m.lanes[lanes]
        if "add" in functions and kind[0] in "su":
            write(m, lanes, _add_in_turn(m, space, numbers, addresses, values, ins.text))
            return
        old = np.empty(len(addresses), TYPES[kind])
        for i in range(len(addresses)):
            lane, one = numbers[i : i + 1], addresses[i : i + 1]
            old[i] = _read(m, space, lane, one, item, item, ins.text).view(TYPES[kind])[0, 0]
            new = np.array([[function(old[i], values[i])]], TYPES[kind]).view(f"u{item}")
            _write(m, space, lane, one, new, ins.text)
        write(m, lanes, old)

    return run


def _add_in_turn(
    m: Machine, space: str, numbers: Integers, addresses: Integers, values: NDArray[Any], text: str
) -> NDArray[Any]:
    """Add integers, and return what each lane found: of the lanes at one place, each the sum of those before it."""
    item = values.dtype.itemsize
    blocks = m.block_of[numbers] if space == "shared" else np.zeros_like(numbers)
    order = np.lexsort((addresses, blocks))  # stable: lanes of a place stay in their order
    numbers, places, added = numbers[order], np.stack([blocks, addresses])[:, order], values[order]
    first = np.flatnonzero(np.concatenate([[True], (places[:, 1:] != places[:, :-1]).any(0)]))
    there = _read(m, space, numbers[first], places[1, first], item, item, text).view(values.dtype)[:, 0]
    until = np.cumsum(added, dtype=values.dtype)
    before = until - added
    counts = np.diff(np.append(first, len(added)))
    old = before + np.repeat(there - before[first], counts)
    last = first + counts - 1
    new = (old[last] + added[last])[:, None].view(f"u{item}")
    _write(m, space, numbers[first], places[1, first], new, text)
    found = np.empty_like(old)
    found[order] = old
    return found


@instruction("membar", "fence")
def _fence(ins: Instruction, _program: Program) -> Operate:
    """Nothing to do: memory is strongly ordered here, which is why this simulator proves nothing about fences."""
    modifiers(ins, "gl cta gpu sc acq_rel", num_types=0)
    return lambda _m, _lanes: None
