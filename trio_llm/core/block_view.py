"""The pool seen from outside: every block, its state and its owners, for displays and checks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import attrs

from trio_llm.core.block_pool import NULL_BLOCK, BlockPool
from trio_llm.core.holder import Holder


@attrs.frozen
class BlockState:
    """One block.

    Attributes:
        state: "empty" and "cached" blocks are free; a prompt may hit a cached one.
        references: Owners that the pool counts; equals len(owners).
        owners: (request_id, group, index in its table) of each.
        digest: Its key in the prefix cache, None while no prompt can hit it.
        eviction_rank: Its place in the free list, 0 is handed out next; None while used.
    """

    block: int
    state: Literal["null", "empty", "cached", "used"]
    references: int
    owners: tuple[tuple[int, int, int], ...]
    digest: bytes | None
    eviction_rank: int | None


def block_states(pool: BlockPool, holders: Iterable[Holder]) -> tuple[BlockState, ...]:
    """Return the state of every block, in the order of their ids, the null block first."""
    owners: dict[int, list[tuple[int, int, int]]] = {}
    for holder in holders:
        for index, table in enumerate(holder.tables):
            for at in range(holder.live_from[index], len(table)):
                owners.setdefault(table[at], []).append((holder.request_id, index, at))
    ranks = {block: rank for rank, block in enumerate(pool.eviction_order())}
    null_owners = tuple(owners.get(NULL_BLOCK, ()))  # None, if all is well.
    states = [BlockState(NULL_BLOCK, "null", pool.references(NULL_BLOCK), null_owners, None, None)]
    for block in range(1, pool.total_blocks + 1):
        digest, rank = pool.digest(block), ranks.get(block)
        state = "used" if rank is None else "empty" if digest is None else "cached"
        states.append(BlockState(block, state, pool.references(block), tuple(owners.get(block, ())), digest, rank))
    return tuple(states)
