"""The state and owners of every block, for displays and checks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import attrs

from trio_llm.core.block_pool import NULL_BLOCK, BlockPool
from trio_llm.core.sequence_blocks import SequenceBlocks


@attrs.frozen
class BlockState:
    """One block.

    Attributes:
        state: "empty" and "cached" blocks are free; a prompt may hit a cached one.
        references: The pool's reference count; equals len(owners).
        owners: (request_id, group, index in its table) of each.
        digest: Its key in the prefix cache; None if it is not cached.
        eviction_rank: Its place in the free list, 0 is allocated next; None while used.
    """

    block: int
    state: Literal["null", "empty", "cached", "used"]
    references: int
    owners: tuple[tuple[int, int, int], ...]
    digest: bytes | None
    eviction_rank: int | None


@attrs.frozen
class PoolMap:
    """Every block at a glance, for displays of many blocks. Columns are indexed by block id, the null block first.

    Attributes:
        owners: A sequence that owns the block, 0 for none. Of several owners, any.
        references: Number of owners.
        cached: Whether a prompt may hit it, used or not.
        held: Blocks of each sequence that has some, over all groups.
    """

    owners: tuple[int, ...]
    references: tuple[int, ...]
    cached: tuple[bool, ...]
    held: dict[int, int]


def pool_map(pool: BlockPool, sequences: Iterable[SequenceBlocks]) -> PoolMap:
    """Return the map of the pool."""
    owners = [0] * (pool.total_blocks + 1)
    held: dict[int, int] = {}
    for sequence in sequences:
        for table, live_from in zip(sequence.tables, sequence.live_from, strict=True):
            for block in table[live_from:]:
                owners[block] = sequence.request_id
            if count := len(table) - live_from:
                held[sequence.request_id] = held.get(sequence.request_id, 0) + count
    return PoolMap(tuple(owners), pool.all_references(), pool.all_cached(), held)


def block_states(pool: BlockPool, sequences: Iterable[SequenceBlocks]) -> tuple[BlockState, ...]:
    """Return the state of every block, in the order of their ids, the null block first."""
    owners: dict[int, list[tuple[int, int, int]]] = {}
    for sequence in sequences:
        for index, table in enumerate(sequence.tables):
            for at in range(sequence.live_from[index], len(table)):
                owners.setdefault(table[at], []).append((sequence.request_id, index, at))
    ranks = {block: rank for rank, block in enumerate(pool.eviction_order())}
    null_owners = tuple(owners.get(NULL_BLOCK, ()))  # Empty, unless there is a bug.
    states = [BlockState(NULL_BLOCK, "null", pool.references(NULL_BLOCK), null_owners, None, None)]
    for block in range(1, pool.total_blocks + 1):
        digest, rank = pool.digest(block), ranks.get(block)
        state = "used" if rank is None else "empty" if digest is None else "cached"
        states.append(BlockState(block, state, pool.references(block), tuple(owners.get(block, ())), digest, rank))
    return tuple(states)
