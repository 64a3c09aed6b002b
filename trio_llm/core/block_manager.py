"""Which KV blocks each sequence owns; asked once a step, it serves a whole batch in the scheduler's order.

It knows nothing of sampling, stopping or clients: tokens come in, block ids go out.
"""

from __future__ import annotations

from operator import itemgetter

from trio_llm.core.block_math import blocks_for, first_visible_block, longest_sequence, max_live_blocks
from trio_llm.core.block_pool import NULL_BLOCK, BlockPool
from trio_llm.core.block_view import BlockState, block_states
from trio_llm.core.holder import Holder, NewBlocks, Rows
from trio_llm.core.prefix import Chain, hit_length
from trio_llm.messages import Admit, BlockAsk, BlockGrant, BlockStats, KVGroup


class BlockManager:
    """Serves one BlockAsk a step out of a pool of blocks.

    Args:
        num_blocks: Size of the pool, the null block 0 included.
        groups: One block table per sequence and group; block sizes are powers of two.
        enable_prefix_caching: Let prompts share the blocks of those that began alike.
        secret: Key of the prefix digests, one per process, at most 64 bytes.
        max_step_tokens: Most tokens of one sequence in flight, over all steps in flight; None where that may be
            a whole sequence. A window group needs so many slots beside its window.
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
        self._holders: dict[int, Holder] = {}
        self._reserved_blocks = 0

    def __repr__(self) -> str:
        pool = self._pool
        used = "+".join(map(str, pool.used_blocks))
        return (
            f"<BlockManager: {pool.total_blocks} blocks, {used} used by {len(self._holders)} sequences, "
            f"{pool.cached_blocks} cached, {pool.num_free - pool.cached_blocks} empty>"
        )

    def max_tokens(self) -> int:
        """Return the longest sequence that fits when it has the pool to itself.

        The scheduler's max_model_len must not be above it: then the first sequence in policy order always advances.
        """
        return longest_sequence(self._pool.total_blocks, self.groups, self._max_step_tokens)

    def tables(self, request_id: int) -> tuple[tuple[int, ...], ...]:
        """Return a sequence's block table per group, null where a block left the window."""
        return tuple(tuple(table) for table in self._holders[request_id].tables)

    def blocks(self) -> tuple[BlockState, ...]:
        """Return the state of every block; block i is at i."""
        return block_states(self._pool, self._holders.values())

    def reserve(self, ask: BlockAsk) -> BlockGrant:
        """Give the rows of one step their blocks, in the order asked, preempting from the end of the policy order."""
        assert self._max_step_tokens is None or ask.max_row_tokens <= self._max_step_tokens
        for request_id, computed in zip(ask.released, ask.released_computed, strict=True):
            self._drop(request_id, computed)
        for admit in ask.admits:
            self._learn(admit)
        self._note_progress(ask)
        rows = Rows(ask.token_budget)
        self._serve_running(ask, rows)
        if not rows.preempted:
            self._serve_waiting(ask, rows)
        if ask.room_ends:
            self._serve_drafts(ask, rows)
        return BlockGrant(
            ask.step,
            tuple(rows.request_ids),
            tuple(rows.starts),
            tuple(rows.counts),
            tuple(rows.new_blocks),
            rows.num_admitted,
            tuple(rows.preempted),
            self._stats(rows),
            tuple(rows.drafts),
            tuple(rows.capacities),
        )

    def _stats(self, rows: Rows) -> BlockStats:
        pool = self._pool
        used = tuple(pool.used_blocks)
        return BlockStats(pool.total_blocks, used, pool.cached_blocks, rows.queried_tokens, rows.hit_tokens)

    # --- what it is told ------------------------------------------------------------------------------------------

    def _learn(self, admit: Admit) -> None:
        tokens = admit.token_ids
        chain = Chain(self._secret, admit.salt, tokens, self._chunk_tokens) if self._caching else None
        tables: list[list[int]] = [[] for _ in self.groups]
        read_cache = admit.read_cache and self._caching
        holder = Holder(admit.request_id, len(tokens), chain, read_cache, tables, [0] * len(self.groups))
        self._holders[admit.request_id] = holder

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
                    holder.chain.tail += new
            if computed >= holder.register_at:
                self._register(holder, computed)

    def _register(self, holder: Holder, computed: int) -> None:
        """Offer the blocks that became full since the last time to the prefix cache, those out of a window excepted."""
        chain = holder.chain
        assert chain is not None
        for group, table, live_from in zip(self.groups, holder.tables, holder.live_from, strict=True):
            size = group.block_size
            for at in range(max(holder.registered // size, live_from), computed // size):
                self._pool.register(table[at], *chain.block(at, size))
        holder.registered = computed - computed % self._chunk_tokens
        holder.register_at = holder.registered + self._chunk_tokens

    def _forget(self, holder: Holder) -> None:
        """Let no prompt hit what this sequence used: something in it is not to be trusted."""
        for table, live_from in zip(holder.tables, holder.live_from, strict=True):
            for block in table[live_from:]:
                self._pool.forget(block)

    # --- running rows ---------------------------------------------------------------------------------------------

    def _serve_running(self, ask: BlockAsk, rows: Rows) -> None:
        holders = self._holders
        victims = list(ask.preempt_order)
        for request_id, computed, start, end in zip(ask.request_ids, ask.computed, ask.starts, ask.ends, strict=True):
            if rows.budget == 0:
                return
            if start == end or (rows.preempted and request_id in rows.preempted):
                continue
            count = min(end - start, rows.budget)
            holder = holders[request_id]
            if start + count <= holder.capacity:
                rows.add(request_id, start, count, ())
                continue
            # What is in flight is yet to be offered to the prefix cache: it must not leave before.
            self._leave_windows(holder, computed)
            if self._make_room(ask, holder, start + count, victims, rows):
                rows.add(request_id, start, count, self._grow(holder, start + count))

    def _make_room(self, ask: BlockAsk, holder: Holder, end: int, victims: list[int], rows: Rows) -> bool:
        """Preempt from the end of the policy order until the blocks are there; False if the asker itself had to go."""
        missing = self._missing(holder, end)
        while missing > self._pool.num_free:
            victim = victims.pop()
            rows.preempt(victim)
            self._release_all(self._holders[victim])
            self._holders[victim].wanted = ask.ends[ask.request_ids.index(victim)]
            if victim == holder.request_id:
                assert victims, f"sequence {victim} is longer than max_tokens()"
                return False
        return True

    def _missing(self, holder: Holder, end: int) -> int:
        """Return how many blocks a sequence lacks up to `end`."""
        missing = 0
        for group, table in zip(self.groups, holder.tables, strict=True):
            missing += max(0, blocks_for(end, group) - len(table))
        return missing

    def _leave_windows(self, holder: Holder, position: int) -> None:
        """Let go of the blocks that neither `position` nor a later one can see."""
        for index, group in enumerate(self.groups):
            live_from = holder.live_from[index]
            visible = first_visible_block(group, position)
            if visible > live_from:
                table = holder.tables[index]
                self._pool.release(table[live_from:visible])
                table[live_from:visible] = [NULL_BLOCK] * (visible - live_from)
                holder.live_from[index] = visible

    def _grow(self, holder: Holder, end: int) -> NewBlocks:
        """Append blocks up to `end` to every table and return what was appended."""
        grown: list[tuple[int, tuple[int, ...]]] = []
        for index, (group, table) in enumerate(zip(self.groups, holder.tables, strict=True)):
            at = len(table)
            taken = self._pool.take(max(0, blocks_for(end, group) - at), index)
            table.extend(taken)
            grown.append((at, tuple(taken)))
            self._use_reserve(holder, len(taken))
        holder.capacity = min(
            len(table) * group.block_size for group, table in zip(self.groups, holder.tables, strict=True)
        )
        return tuple(grown)

    def _use_reserve(self, holder: Holder, count: int) -> None:
        count = min(count, holder.reserved)
        holder.reserved -= count
        self._reserved_blocks -= count

    def _release_all(self, holder: Holder) -> None:
        """Free a sequence's blocks, the tail first: its beginning is what other prompts share."""
        held = [
            (at * group.block_size, table[at])
            for group, table, live_from in zip(self.groups, holder.tables, holder.live_from, strict=True)
            for at in range(live_from, len(table))
        ]
        held.sort(key=itemgetter(0), reverse=True)
        self._pool.release([block for _, block in held])
        self._reserved_blocks -= holder.reserved
        holder.reset()

    # --- drafts ---------------------------------------------------------------------------------------------------

    def _serve_drafts(self, ask: BlockAsk, rows: Rows) -> None:
        """Give those who compute their last known token what is left: blocks beyond it, and budget for their drafts.

        Guesses must never cost anybody what is sure: blocks are left only where no sequence lost its own in this step,
        none waits for some and none was promised them.
        """
        wishes = zip(ask.drafts, ask.room_ends, strict=True)
        wish_of = dict(zip((*ask.request_ids, *ask.waiting), wishes, strict=True))
        computed = dict(zip(ask.request_ids, ask.computed, strict=True))
        are_left = not rows.preempted and rows.num_admitted == len(ask.waiting)
        for at, request_id in enumerate(rows.request_ids):
            holder, start = self._holders[request_id], rows.starts[at]
            end, num_drafts = start + rows.counts[at], 0
            grown: NewBlocks = ()
            if end == holder.num_tokens:
                num_drafts, room_end = wish_of[request_id]
                if are_left and room_end > holder.capacity:
                    self._leave_windows(holder, computed.get(request_id, start))
                    if self._missing(holder, room_end) <= self._pool.num_free - self._reserved_blocks:
                        grown = self._grow(holder, room_end)
                num_drafts = min(num_drafts, rows.budget, holder.capacity - end)
            rows.extend(at, num_drafts, grown, holder.capacity)

    # --- waiting rows ---------------------------------------------------------------------------------------------

    def _serve_waiting(self, ask: BlockAsk, rows: Rows) -> None:
        for request_id in ask.waiting:
            if rows.budget == 0 or not self._admit(self._holders[request_id], ask.max_row_tokens, rows):
                return

    def _admit(self, holder: Holder, max_row_tokens: int, rows: Rows) -> bool:
        """Start a sequence if all its tokens would fit beside what was promised to others."""
        available = self._pool.num_free - self._reserved_blocks
        if holder.needs > available:
            return False
        start, hits = self._find_hits(holder)
        needs = self._needs(max(holder.num_tokens, holder.wanted), start, hits)
        if needs > available:
            assert needs <= self._pool.total_blocks, f"sequence {holder.request_id} is longer than max_tokens()"
            holder.needs = needs
            return False
        free_before = self._pool.num_free
        self._share(holder, start, hits)
        count = min(holder.num_tokens - start, max_row_tokens, rows.budget)
        self._grow(holder, start + count)
        holder.reserved = needs - (free_before - self._pool.num_free)
        self._reserved_blocks += holder.reserved
        rows.add(holder.request_id, start, count, tuple([(0, tuple(table)) for table in holder.tables]))
        rows.num_admitted += 1
        if not holder.was_admitted and holder.read_cache:
            rows.queried_tokens += holder.num_tokens
            rows.hit_tokens += start
        holder.was_admitted = True
        return True

    def _find_hits(self, holder: Holder) -> tuple[int, list[list[int]]]:
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
        needs = 0
        for group, blocks in zip(self.groups, hits, strict=True):
            idle = sum([self._pool.references(block) == 0 for block in blocks])
            new = blocks_for(num_tokens, group) - start // group.block_size
            needs += min(max_live_blocks(num_tokens, group, self._max_step_tokens), new + idle)
        return needs

    def _share(self, holder: Holder, start: int, hits: list[list[int]]) -> None:
        """Begin the tables with the blocks that were hit, null where the window has passed."""
        for index, (group, blocks) in enumerate(zip(self.groups, hits, strict=True)):
            for block in blocks:
                self._pool.share(block)
            skipped = start // group.block_size - len(blocks)
            holder.tables[index] = [NULL_BLOCK] * skipped + blocks
            holder.live_from[index] = skipped
        if holder.chain is not None:
            holder.registered = start
            holder.register_at = start + self._chunk_tokens
