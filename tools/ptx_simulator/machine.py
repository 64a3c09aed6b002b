"""A batch of thread blocks side by side: registers, the order of execution, barriers.

Lane number = (warp * blocks + block) * 32 + lane of the warp, so that "one warp of every block" is a slice and
numpy reads and writes registers without copying. Lanes at the lowest program counter run first, which mostly brings
diverged lanes together again at the earliest point; where it does not, an instruction of a whole warp waits for the
warp's other lanes, as the hardware does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from tools.ptx_simulator.counters import Counters
from tools.ptx_simulator.errors import KernelFaultError, UnsupportedError
from tools.ptx_simulator.memory import GlobalMemory, Integers, SharedMemory
from tools.ptx_simulator.program import Program, Register

Lanes = slice | Integers  # lanes an instruction runs on: a slice where they are contiguous
Operate = Callable[["Machine", Lanes], None]
Dim3 = tuple[int, int, int]
_WIDTHS = {"pred": "?", "b8": "u1", "b16": "u2", "b32": "u4", "b64": "u8"}

LOCKSTEP, FIRST_WARP_FIRST, LAST_WARP_FIRST = range(3)
ORDERS = (LOCKSTEP, FIRST_WARP_FIRST, LAST_WARP_FIRST)
# Instructions that a warp executes together.
COLLECTIVES = frozenset({"bar", "shfl", "vote", "ldmatrix", "mma"})


def storage_type(declared: str) -> str:
    """Return the numpy type that holds a register declared as, for example, f32: its bits, unsigned."""
    return _WIDTHS["pred" if declared == "pred" else "b" + declared[1:]]


def lanes_of(mask: NDArray[np.bool_]) -> Lanes:
    """Return the lanes of a mask, which has at least one."""
    found = np.flatnonzero(mask)
    if found[-1] - found[0] + 1 == len(found):
        return slice(int(found[0]), int(found[-1]) + 1)
    return found


class Machine:
    """Blocks that run together.

    Attributes:
        block_of: Number of the lane's block in the batch.
        arguments: Parameter name -> its bits, an array of one element.
        addresses_of: Shared variable -> its address.
        commits: Per lane, groups of asynchronous copies committed so far.
        is_ahead: Which lanes have yet to wait for the kernels before this one; None where it follows them anyway.
    """

    def __init__(
        self,
        program: Program,
        code: tuple[Operate | None, ...],
        arguments: Mapping[str, NDArray[np.unsignedinteger]],
        memory: GlobalMemory,
        blocks: Integers,
        grid: Dim3,
        block: Dim3,
        shared_bytes: int,
        order: int,
        counters: Counters | None,
        *,
        is_dependent: bool,
    ) -> None:
        self._program, self._code, self._order = program, code, order
        self.arguments, self.memory, self.counters = arguments, memory, counters
        threads, count = int(np.prod(block)), len(blocks)
        if threads % 32:
            raise UnsupportedError(f"a block of {threads} threads is not whole warps")
        warps, self._blocks = threads // 32, blocks
        self._shape = (warps, count, 32)
        self.lanes = np.arange(warps * count * 32)
        self.block_of = self.lanes // 32 % count
        thread = self.lanes // (32 * count) * 32 + self.lanes % 32
        self.special = _special_registers(thread, blocks[self.block_of], grid, block)
        self.registers = {
            name: np.zeros(len(self.lanes), storage_type(kind)) for name, kind in program.registers.items()
        }
        self.addresses_of, size = _lay_out(program, shared_bytes)
        self.shared = SharedMemory(count, size)
        self.copies: list[tuple[Integers, ...]] = []
        self.commits = np.zeros(len(self.lanes), np.int64)
        self.is_ahead = np.ones(len(self.lanes), np.bool_) if is_dependent else None
        self._pc = np.zeros(len(self.lanes), np.int64)
        self._alive = np.ones(len(self.lanes), np.bool_)
        self._waiting = np.zeros(len(self.lanes), np.bool_)
        self._parked = np.zeros(len(self.lanes), np.bool_)

    def run(self) -> None:
        """Run every block to its end."""
        with np.errstate(all="ignore"):  # overflow and NaN are what the hardware makes of them
            self._run()
        if self.copies:
            raise KernelFaultError("asynchronous copies are in flight at the end of the kernel")

    def _run(self) -> None:
        while self._alive.any():
            runnable = self._alive & ~self._waiting & ~self._parked
            if not runnable.any():
                if self._parked.any():
                    text = self._program.instructions[int(self._pc[self._parked][0])].text
                    raise KernelFaultError(f"{text}: the rest of the warp never comes here")
                self._open_barriers()
                continue
            if self._order != LOCKSTEP:
                runnable &= self._one_warp_of_each_block(runnable)
            pcs = self._pc[runnable]
            pc = int(pcs.min())
            later = pcs[pcs > pc]
            stop = int(later.min()) if len(later) else len(self._code)
            self._run_group(lanes_of(runnable & (self._pc == pc)), pc, stop)

    def _one_warp_of_each_block(self, runnable: NDArray[np.bool_]) -> NDArray[np.bool_]:
        warps = np.any(runnable.reshape(self._shape), axis=2)
        count = len(warps)
        chosen = warps.argmax(0) if self._order == FIRST_WARP_FIRST else count - 1 - warps[::-1].argmax(0)
        return np.repeat(np.arange(count)[:, None] == chosen, 32)

    def _open_barriers(self) -> None:
        """Let every block pass its barrier: no lane can run, so all that are alive wait."""
        some = self._waiting.reshape(self._shape).any((0, 2))
        missing = (~self._waiting).reshape(self._shape).any((0, 2))
        if (some & missing).any():
            raise KernelFaultError("bar.sync: some threads of the block have left the kernel")
        self._waiting[:] = False

    def _run_group(self, lanes: Lanes, pc: int, stop: int) -> None:
        """Run lanes that stand at the same place until they part, wait, end, or meet others at `stop`."""
        instructions = self._program.instructions
        while pc < stop:
            operate, instruction = self._code[pc], instructions[pc]
            if instruction.opcode in COLLECTIVES:
                together = self._gather_warps(lanes, pc)
                if together is None:
                    return
                lanes = together
            if self.counters is not None:
                self.counters.issue(
                    instruction.opcode, self._blocks[np.unique(self.lanes[lanes] // 32) % len(self._blocks)]
                )
            chosen = lanes if instruction.guard is None else self._guarded(lanes, instruction.guard)
            if operate is not None:
                if chosen is not None:
                    operate(self, chosen)
                pc += 1
                continue
            if chosen is None:
                pc += 1
                continue
            target = self._control(instruction.opcode, instruction.operands, lanes, chosen, pc)
            if target is None:
                return
            pc = target
        self._pc[lanes] = pc
        if pc >= len(self._code):
            self._end(lanes)

    def _gather_warps(self, lanes: Lanes, pc: int) -> Lanes | None:
        """Return the whole warps that have come to a collective instruction, and park the lanes of others."""
        if isinstance(lanes, slice) and lanes.start % 32 == 0 and lanes.stop % 32 == 0:
            return lanes
        here = self._parked & (self._pc == pc)
        here[lanes] = True
        whole = np.repeat(here.reshape(-1, 32).all(1), 32)
        self._parked[here] = ~whole[here]
        self._pc[here] = pc
        return lanes_of(whole) if whole.any() else None

    def _control(self, opcode: str, operands: tuple, lanes: Lanes, chosen: Lanes, pc: int) -> int | None:
        """Branch, wait or end. Returns where the whole group goes on, or None where it is done or has parted."""
        self._pc[lanes] = pc + 1
        if opcode == "bra":
            target = self._program.labels[operands[0].name]
            if self.size(chosen) == self.size(lanes):
                return target
            self._pc[chosen] = target
        elif opcode == "bar":
            self.require_whole_warps(chosen, "bar.sync")
            self._waiting[chosen] = True
        else:
            self._end(chosen)
        return None

    def _end(self, lanes: Lanes) -> None:
        if self.is_ahead is not None and self.is_ahead[lanes].any():
            raise KernelFaultError("a thread ends that has not waited for the kernels before: the next may pass them")
        self._alive[lanes] = False

    def _guarded(self, lanes: Lanes, guard: Register) -> Lanes | None:
        """Return the lanes whose guard holds; None if the instruction has no guard."""
        held = self.registers[guard.name][lanes] ^ guard.negated
        if held.all():
            return lanes
        return self.narrow(lanes, held) if held.any() else None

    # ---- for instructions

    def touch_global(self, lanes: Lanes, addresses: Integers, text: str, *, write: bool = False) -> None:
        """Refuse an access that may come before the writes, or the reads, of a kernel before this one."""
        if self.is_ahead is None:
            return
        ahead = self.is_ahead[lanes]
        if ahead.any() and (write or not self.memory.is_early(addresses[ahead])):
            raise KernelFaultError(f"{text}: before griddepcontrol.wait, of what is not declared EARLY")

    def narrow(self, lanes: Lanes, mask: NDArray[np.bool_]) -> Lanes:
        return self.lanes[lanes][mask]

    def size(self, lanes: Lanes) -> int:
        return lanes.stop - lanes.start if isinstance(lanes, slice) else len(lanes)

    def require_whole_warps(self, lanes: Lanes, what: str) -> int:
        """Return the number of warps; a warp of which only a part is here raises."""
        if isinstance(lanes, slice):
            whole = lanes.start % 32 == 0 and lanes.stop % 32 == 0
        else:
            firsts = lanes[::32]
            whole = len(lanes) % 32 == 0 and not (firsts % 32).any()
            whole = whole and bool((lanes.reshape(-1, 32) == firsts[:, None] + np.arange(32)).all())
        if not whole:
            raise KernelFaultError(f"{what}: a warp is not converged")
        return self.size(lanes) // 32


def _special_registers(thread: Integers, block: Integers, grid: Dim3, shape: Dim3) -> dict[str, NDArray[np.uint32]]:
    values: dict[str, Integers] = {"%laneid": thread % 32}
    for name, index, extent in (("tid", thread, shape), ("ctaid", block, grid)):
        values[f"%{name}.x"] = index % extent[0]
        values[f"%{name}.y"] = index // extent[0] % extent[1]
        values[f"%{name}.z"] = index // (extent[0] * extent[1])
        for axis, n in zip("xyz", extent, strict=True):
            values[f"%n{name}.{axis}"] = np.full(len(thread), n)
    return {name: value.astype(np.uint32) for name, value in values.items()}


def _lay_out(program: Program, dynamic_bytes: int) -> tuple[dict[str, int], int]:
    """Place static shared variables, then the dynamic one; returns addresses and the total size."""
    places: dict[str, int] = {}
    at = 0
    for variable in sorted(program.shared, key=lambda v: v.size == 0):
        at = -(-at // variable.align) * variable.align
        places[variable.name] = at
        at += variable.size
    return places, at + dynamic_bytes
