"""Counts the work that a GPU would do while a kernel is simulated, and the least possible work.

Global traffic is counted in sectors of 32 bytes per warp instruction, shared accesses in passes over the 32 banks
of 4 bytes; both as NVIDIA's profiler counts them. They say nothing of time, but a kernel that moves more sectors than
its data fills, or that conflicts in its banks, is slow on every GPU.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import NDArray

SECTOR_BYTES = 32
BANK_BYTES = 4
BANKS = 32


class Counters:
    """Totals of one or several launches.

    Attributes:
        issued: Warp instructions by opcode.
        by_block: Warp instructions by the number of the block.
        sectors, sectors_least: Global sectors moved, and the least that the accessed bytes need, by instruction.
        passes, passes_least: Shared-memory passes, likewise.
    """

    def __init__(self) -> None:
        self.issued: Counter[str] = Counter()
        self.by_block: Counter[int] = Counter()
        self.sectors: Counter[str] = Counter()
        self.sectors_least: Counter[str] = Counter()
        self.passes: Counter[str] = Counter()
        self.passes_least: Counter[str] = Counter()

    def issue(self, opcode: str, blocks: NDArray[np.int64]) -> None:
        """Count one instruction of a warp of each of these blocks, which may come several times."""
        self.issued[opcode] += len(blocks)
        numbers, counts = np.unique(blocks, return_counts=True)
        self.by_block.update(dict(zip(numbers.tolist(), counts.tolist(), strict=True)))

    def global_access(self, opcode: str, warps: NDArray[np.int64], addresses: NDArray[np.int64], width: int) -> None:
        """Count one access of `width` bytes by each lane of some warps."""
        sectors = np.stack([warps, addresses // SECTOR_BYTES])
        self.sectors[opcode] += np.unique(sectors, axis=1).shape[1]
        accesses = np.unique(np.stack([warps, addresses]), axis=1)
        bytes_of_warp = np.unique(accesses[0], return_counts=True)[1] * width
        self.sectors_least[opcode] += int((-(-bytes_of_warp // SECTOR_BYTES)).sum())

    def shared_access(self, opcode: str, warps: NDArray[np.int64], addresses: NDArray[np.int64], width: int) -> None:
        """Count one access of `width` bytes by each lane: a warp is served 128 bytes at a time."""
        lanes_a_pass = BANKS * BANK_BYTES // max(width, BANK_BYTES)
        for warp in np.unique(warps):
            mine = addresses[warps == warp]
            for first in range(0, len(mine), lanes_a_pass):
                served = mine[first : first + lanes_a_pass, None] + np.arange(0, width, BANK_BYTES)
                words = np.unique(served // BANK_BYTES)
                self.passes[opcode] += int(np.bincount(words % BANKS).max())
                self.passes_least[opcode] += 1
