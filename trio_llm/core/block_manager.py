"""Which KV blocks each sequence owns; asked once a step, it serves a whole batch in the scheduler's order.

It knows nothing of sampling, stopping or clients: tokens come in, block ids go out.
"""

from __future__ import annotations

import sys
from operator import itemgetter

import attrs

from trio_llm.core.block_pool import NULL_BLOCK, BlockPool
from trio_llm.core.prefix import Chain, first_visible_block, hit_length
from trio_llm.messages import Admit, BlockAsk, BlockGrant, BlockStats, KVGroup

MAX_POSITIONS = 2**31 - 1
"""Positions are int32 on the device; no sequence is longer, however little a window needs."""


@attrs.define(eq=False)
class _Holder:
    """What the manager knows of one sequence.

    Attributes:
        tables: Per group, its blocks; only ever appended to while it runs.
        live_from: Per group, index of the first block it still owns; those before left the window.
        capacity: Tokens that have a slot in every group.
        registered: Tokens whose full blocks were offered to the prefix cache.
        register_at: The number of computed tokens at which there is one more to offer.
        reserved: Blocks its admission counted on and that it has not taken yet.
        needs: Free blocks it lacked when last looked at; with fewer there is no use looking again.
    """

    request_id: int
    num_tokens: int
    chain: Chain | None
    read_cache: bool
    tables: list[list[int]]
    live_from: list[int]
    capacity: int = 0
    registered: int = 0
    register_at: int = sys.maxsize
    reserved: int = 0
    needs: int = 0
    was_admitted: bool = False


@attrs.define(eq=False)
class _Rows:
    """The grant while it is being made."""

    budget: int
    request_ids: list[int] = attrs.field(factory=list[int])
    starts: list[int] = attrs.field(factory=list[int])
    counts: list[int] = attrs.field(factory=list[int])
    new_blocks: list[tuple[tuple[int, tuple[int, ...]], ...]] = attrs.field(
        factory=list[tuple[tuple[int, tuple[int, ...]], ...]]
    )
    num_admitted: int = 0
    preempted: list[int] = attrs.field(factory=list[int])
    queried_tokens: int = 0
    hit_tokens: int = 0

    def add(self, request_id: int, start: int, count: int, new: tuple[tuple[int, tuple[int, ...]], ...]) -> None:
        self.request_ids.append(request_id)
        self.starts.append(start)
        self.counts.append(count)
        self.new_blocks.append(new)
        self.budget -= count

    def remove(self, request_id: int) -> None:
        """Take out a row that was granted before it became a victim."""
        if request_id in self.request_ids:
            at = self.request_ids.index(request_id)
            self.budget += self.counts[at]
            for column in (self.request_ids, self.starts, self.counts, self.new_blocks):
                del column[at]


@attrs.frozen
class BlockState:
    """One block, for displays and checks.

    Attributes:
        state: "null", "empty", "cached" (free, but a prompt may hit it) or "used".
        owners: (request_id, group, index in its table) of every reference.
        digest: Its key in the prefix cache, None while no prompt can hit it.
        eviction_rank: Its place in the free list, 0 is handed out next; None while used.
    """

    block: int
    state: str
    owners: tuple[tuple[int, int, int], ...]
    digest: bytes | None
    eviction_rank: int | None


class BlockManager:
    """Serves one BlockAsk a step out of a pool of blocks.

    Args:
        num_blocks: Size of the pool, the null block 0 included.
        groups: One block table per sequence and group; block sizes are powers of two.
        secret: Key of the prefix digests, one per process.
        max_step_tokens: Most tokens of one sequence in a step; None where a step may hold a whole sequence.
            A window group needs this many slots beside its window.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        groups: tuple[KVGroup, ...],
        enable_prefix_caching: bool = True,
        secret: bytes,
        max_step_tokens: int | None = None,
    ) -> None:
        assert groups
        assert all(group.block_size & (group.block_size - 1) == 0 for group in groups)
        self.groups = groups
        self._pool = BlockPool(num_blocks, len(groups))
        self._caching = enable_prefix_caching
        self._secret = secret
        self._max_step_tokens = max_step_tokens
        self._chunk_tokens = min(group.block_size for group in groups)
        self._holders: dict[int, _Holder] = {}
        self._reserved_blocks = 0
        self._longest = self._find_max_tokens()

    def __repr__(self) -> str:
        pool = self._pool
        used = "+".join(map(str, pool.used_blocks))
        empty = pool.num_free - pool.cached_blocks
        return (
            f"<BlockManager: {pool.total_blocks} blocks, {used} used by {len(self._holders)} sequences, "
            f"{pool.cached_blocks} cached, {empty} empty>"
        )

    def max_tokens(self) -> int:
        """Return the longest sequence that fits when it has the pool to itself.

        The scheduler's max_model_len must not be above it: then the first sequence in policy order always advances.
        """
        return self._longest

    def reserve(self, ask: BlockAsk) -> BlockGrant:
        """Give the rows of one step their blocks, in the order asked, preempting from the end of the policy order."""
        for request_id, computed in zip(ask.released, ask.released_computed, strict=True):
            self._drop(request_id, computed)
        for admit in ask.admits:
            self._learn(admit)
        self._note_progress(ask)
        rows = _Rows(ask.token_budget)
        self._serve_running(ask, rows)
        if not rows.preempted:
            self._serve_waiting(ask, rows)
        return BlockGrant(
            ask.step,
            tuple(rows.request_ids),
            tuple(rows.starts),
            tuple(rows.counts),
            tuple(rows.new_blocks),
            rows.num_admitted,
            tuple(rows.preempted),
            self._stats(rows),
        )

    # --- what is told ---------------------------------------------------------------------------------------------

    def _learn(self, admit: Admit) -> None:
        chain = None
        if self._caching:
            chain = Chain(self._secret, admit.salt, self._chunk_tokens)
            chain.extend(admit.token_ids)
        self._holders[admit.request_id] = _Holder(
            admit.request_id,
            len(admit.token_ids),
            chain,
            admit.read_cache and self._caching,
            [[] for _ in self.groups],
            [0] * len(self.groups),
        )

    def _drop(self, request_id: int, computed: int) -> None:
        holder = self._holders.pop(request_id)
        if computed < 0:
            self._forget(holder)
        elif computed >= holder.register_at:
            self._register(holder, computed)
        self._release_all(holder)

    def _note_progress(self, ask: BlockAsk) -> None:
        """Take in what the last step sampled and computed, for all rows before any of them may be preempted."""
        holders = self._holders
        for request_id, computed, new in zip(ask.request_ids, ask.computed, ask.new_token_ids, strict=True):
            holder = holders[request_id]
            if new:
                holder.num_tokens += len(new)
                if holder.chain is not None:
                    holder.chain.extend(new)
            if computed >= holder.register_at:
                self._register(holder, computed)

    def _register(self, holder: _Holder, computed: int) -> None:
        """Offer the blocks that `computed` tokens filled since the last time to the prefix cache."""
        assert holder.chain is not None
        for index, group in enumerate(self.groups):
            size = group.block_size
            table = holder.tables[index]
            for at in range(max(holder.registered // size, holder.live_from[index]), computed // size):
                self._pool.register(table[at], *holder.chain.block(at, size))
        holder.registered = computed - computed % self._chunk_tokens
        holder.register_at = holder.registered + self._chunk_tokens

    def _forget(self, holder: _Holder) -> None:
        for table, live_from in zip(holder.tables, holder.live_from, strict=True):
            for block in table[live_from:]:
                self._pool.forget(block)

    # --- running rows ---------------------------------------------------------------------------------------------

    def _serve_running(self, ask: BlockAsk, rows: _Rows) -> None:
        victims: list[int] | None = None
        holders = self._holders
        for request_id, start, end in zip(ask.request_ids, ask.computed, ask.ends, strict=True):
            if rows.budget == 0:
                return
            if rows.preempted and request_id in rows.preempted:
                continue
            count = min(end - start, rows.budget)
            holder = holders[request_id]
            if start + count <= holder.capacity:
                rows.add(request_id, start, count, ())
                continue
            self._leave_window(holder, start)
            missing = self._missing(holder, start + count)
            if missing > self._pool.num_free and victims is None:
                victims = list(ask.preempt_order)
            while victims and missing > self._pool.num_free and request_id not in rows.preempted:
                self._preempt(victims.pop(), rows)
            if request_id not in rows.preempted:
                rows.add(request_id, start, count, self._grow(holder, start + count))

    def _preempt(self, request_id: int, rows: _Rows) -> None:
        """Take all blocks from a sequence; its KV is computed again later, mostly from the prefix cache."""
        rows.remove(request_id)
        rows.preempted.append(request_id)
        self._release_all(self._holders[request_id])

    def _leave_window(self, holder: _Holder, position: int) -> None:
        """Let go of the blocks that neither `position` nor a later one can see."""
        for index, group in enumerate(self.groups):
            live_from = holder.live_from[index]
            visible = first_visible_block(group, position)
            if visible > live_from:
                table = holder.tables[index]
                self._pool.release(table[live_from:visible])
                table[live_from:visible] = [NULL_BLOCK] * (visible - live_from)
                holder.live_from[index] = visible

    def _missing(self, holder: _Holder, end: int) -> int:
        return sum(
            max(0, _blocks_for(end, group) - len(table))
            for group, table in zip(self.groups, holder.tables, strict=True)
        )

    def _grow(self, holder: _Holder, end: int) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """Append blocks up to `end` to every table and return what was appended."""
        grown: list[tuple[int, tuple[int, ...]]] = []
        for index, (group, table) in enumerate(zip(self.groups, holder.tables, strict=True)):
            at = len(table)
            taken = self._pool.take(max(0, _blocks_for(end, group) - at), index)
            table.extend(taken)
            grown.append((at, tuple(taken)))
            self._use_reserve(holder, len(taken))
        holder.capacity = min(
            len(table) * group.block_size for group, table in zip(self.groups, holder.tables, strict=True)
        )
        return tuple(grown)

    def _use_reserve(self, holder: _Holder, count: int) -> None:
        count = min(count, holder.reserved)
        holder.reserved -= count
        self._reserved_blocks -= count

    def _release_all(self, holder: _Holder) -> None:
        """Free a sequence's blocks, the tail first: its beginning is what other prompts share."""
        held = [
            (at * group.block_size, table[at])
            for group, table, live_from in zip(self.groups, holder.tables, holder.live_from, strict=True)
            for at in range(live_from, len(table))
        ]
        held.sort(key=itemgetter(0), reverse=True)
        self._pool.release(block for _, block in held)
        self._use_reserve(holder, holder.reserved)
        holder.tables = [[] for _ in self.groups]
        holder.live_from = [0] * len(self.groups)
        holder.capacity = holder.registered = holder.needs = 0
        holder.register_at = sys.maxsize

    # --- waiting rows ---------------------------------------------------------------------------------------------

    def _serve_waiting(self, ask: BlockAsk, rows: _Rows) -> None:
        for request_id in ask.waiting:
            holder = self._holders[request_id]
            if rows.budget == 0 or not self._admit(holder, min(rows.budget, ask.max_row_tokens), rows):
                return

    def _admit(self, holder: _Holder, max_tokens: int, rows: _Rows) -> bool:
        """Start a sequence if its whole prompt would fit beside what was promised to others."""
        available = self._pool.num_free - self._reserved_blocks
        if holder.needs > available:
            return False
        start, hits = self._find_hits(holder)
        needs = self._needs(holder.num_tokens, start, hits)
        if needs > available:
            holder.needs = needs
            return False
        free_before = self._pool.num_free
        for index, (group, blocks) in enumerate(zip(self.groups, hits, strict=True)):
            for block in blocks:
                self._pool.share(block)
            skipped = start // group.block_size - len(blocks)
            holder.tables[index] = [NULL_BLOCK] * skipped + blocks
            holder.live_from[index] = skipped
        count = min(holder.num_tokens - start, max_tokens)
        self._grow(holder, start + count)
        holder.reserved = needs - (free_before - self._pool.num_free)
        self._reserved_blocks += holder.reserved
        if self._caching:
            holder.registered = start
            holder.register_at = start + self._chunk_tokens
        rows.add(holder.request_id, start, count, tuple((0, tuple(table)) for table in holder.tables))
        rows.num_admitted += 1
        self._count_hit(holder, start, rows)
        return True

    def _find_hits(self, holder: _Holder) -> tuple[int, list[list[int]]]:
        """Return how many tokens are cached, one left to compute, and per group the blocks that are still visible."""
        chain = holder.chain
        if chain is None or not holder.read_cache:
            return 0, [[] for _ in self.groups]

        def find(index: int, at: int) -> int:
            return self._pool.find(index, *chain.block(at, self.groups[index].block_size))

        length = hit_length(self.groups, holder.num_tokens - 1, find)
        return length, [
            [find(index, at) for at in range(first_visible_block(group, length), length // group.block_size)]
            for index, group in enumerate(self.groups)
        ]

    def _needs(self, num_tokens: int, start: int, hits: list[list[int]]) -> int:
        """Return the free blocks that computing tokens `start` to `num_tokens` can take at any one time."""
        total = 0
        for group, blocks in zip(self.groups, hits, strict=True):
            idle = sum(self._pool.references(block) == 0 for block in blocks)
            new = _blocks_for(num_tokens, group) - start // group.block_size
            total += min(self._live_bound(num_tokens, group), new + idle)
        return total

    def _count_hit(self, holder: _Holder, start: int, rows: _Rows) -> None:
        if not holder.was_admitted and holder.read_cache:
            rows.queried_tokens += holder.num_tokens
            rows.hit_tokens += start
        holder.was_admitted = True

    # --- sizes ----------------------------------------------------------------------------------------------------

    def _live_bound(self, num_tokens: int, group: KVGroup) -> int:
        """Return the most blocks of a group that a sequence of this length owns at any one time."""
        blocks = _blocks_for(num_tokens, group)
        if group.window is None or self._max_step_tokens is None:
            return blocks
        return min(blocks, _blocks_for(group.window - 1 + self._max_step_tokens, group) + 1)

    def _find_max_tokens(self) -> int:
        low, high = 0, MAX_POSITIONS
        while low < high:
            middle = (low + high + 1) // 2
            if sum(self._live_bound(middle, group) for group in self.groups) <= self._pool.total_blocks:
                low = middle
            else:
                high = middle - 1
        return low

    def _stats(self, rows: _Rows) -> BlockStats:
        pool = self._pool
        return BlockStats(
            pool.total_blocks, tuple(pool.used_blocks), pool.cached_blocks, rows.queried_tokens, rows.hit_tokens
        )

    # --- read-only views ------------------------------------------------------------------------------------------

    def tables(self, request_id: int) -> tuple[tuple[int, ...], ...]:
        """Return a sequence's block table per group; null where a block left the window."""
        return tuple(tuple(table) for table in self._holders[request_id].tables)

    def blocks(self) -> tuple[BlockState, ...]:
        """Return the state of every block, the null block first."""
        owners: dict[int, list[tuple[int, int, int]]] = {}
        for holder in self._holders.values():
            for index, table in enumerate(holder.tables):
                for at in range(holder.live_from[index], len(table)):
                    owners.setdefault(table[at], []).append((holder.request_id, index, at))
        ranks = {block: rank for rank, block in enumerate(self._pool.eviction_order())}
        states = [BlockState(NULL_BLOCK, "null", (), None, None)]
        for block in range(1, self._pool.total_blocks + 1):
            digest, rank = self._pool.digest(block), ranks.get(block)
            state = "used" if rank is None else "empty" if digest is None else "cached"
            states.append(BlockState(block, state, tuple(owners.get(block, ())), digest, rank))
        return tuple(states)


def _blocks_for(num_tokens: int, group: KVGroup) -> int:
    return -(-num_tokens // group.block_size)
