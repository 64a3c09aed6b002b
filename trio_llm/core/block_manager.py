"""Allocates KV blocks to sequences: once per step, for the whole batch, in the scheduler's order.

Tokens come in, block ids go out. It does not know sampling, stopping or clients.
"""

from __future__ import annotations

from operator import sub

from trio_llm.core.block_math import blocks_for, first_visible_block, longest_sequence, max_live_blocks
from trio_llm.core.block_pool import NULL_BLOCK, BlockPool, Removed, Stored
from trio_llm.core.block_view import BlockState, PoolMap, block_states, pool_map
from trio_llm.core.prefix import Chain, Difference, difference, hit_length
from trio_llm.core.sequence_blocks import NewBlocks, Rows, SequenceBlocks, lower_needs
from trio_llm.core.step_order import check_reserve
from trio_llm.messages import Admit, BlockAsk, BlockGrant, BlockStats
from trio_llm.model_info import KVGroup


class BlockManager:
    """Answers one BlockAsk per step from a pool of blocks.

    Args:
        num_blocks: Size of the pool, the null block 0 included.
        groups: One block table per sequence and group; block sizes are powers of two.
        enable_prefix_caching: Share blocks between prompts with the same prefix.
        secret: Key of the prefix digests, one per process, at most 64 bytes.
        max_step_tokens: Maximum tokens of one sequence over all steps in flight; None if that may be a whole
            sequence. A window group needs this many slots in addition to its window.
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
        self._sequences: dict[int, SequenceBlocks] = {}
        self._reserved_blocks = 0
        self._any_refused = True  # Or not known.
        self._last_step = 0

    def __repr__(self) -> str:
        pool = self._pool
        used = "+".join(map(str, pool.used_blocks))
        return (
            f"<BlockManager: {pool.total_blocks} blocks, {used} used by {len(self._sequences)} sequences, "
            f"{pool.cached_blocks} cached, {pool.num_free - pool.cached_blocks} empty>"
        )

    def max_tokens(self) -> int:
        """Return the length of the longest sequence that fits into an empty pool.

        The scheduler's max_model_len must not exceed it, so that the first sequence in policy order always advances.
        """
        return longest_sequence(self._pool.total_blocks, self.groups, self._max_step_tokens)

    def tables(self, request_id: int) -> tuple[tuple[int, ...], ...]:
        """Return a sequence's block table per group, with the null block for blocks that left the window."""
        return tuple(tuple(table) for table in self._sequences[request_id].tables)

    def chain(self, request_id: int) -> Chain | None:
        """Return a sequence's keys in the prefix cache; None if the cache is disabled."""
        return self._sequences[request_id].chain

    def difference(self, request_id: int, num_cached: int) -> Difference | None:
        """Return where a sequence, just admitted with `num_cached` tokens, leaves a cached one that begins alike.

        None if nothing in the cache goes on after these tokens, or the same way, or the sequence does not read it.
        """
        sequence = self._sequences[request_id]
        # A block of several chunks does not show which of them is another one.
        sizes = [group.block_size for group in self.groups]
        if sequence.chain is None or not sequence.read_cache or self._chunk_tokens not in sizes:
            return None
        index = num_cached // self._chunk_tokens
        content = self._pool.content_after(sizes.index(self._chunk_tokens), sequence.chain.parent(index))
        return None if content is None else difference(sequence.chain, index, self._chunk_tokens, content)

    def blocks(self) -> tuple[BlockState, ...]:
        """Return the state of every block, indexed by block id."""
        return block_states(self._pool, self._sequences.values())

    def watch(self) -> None:
        """Keep what enters and leaves the prefix cache from now on, for `take_moves`."""
        self._pool.moves = []

    def take_moves(self) -> list[Stored | Removed]:
        """Return what entered and left the prefix cache since the last call, in order."""
        moves, self._pool.moves = self._pool.moves, []
        return moves or []

    def pool_map(self) -> PoolMap:
        """Return owners and reference counts of all blocks, a few times faster than `blocks`."""
        return pool_map(self._pool, self._sequences.values())

    def reserve(self, ask: BlockAsk) -> BlockGrant:
        """Allocate blocks to the rows of one step, in the order asked; preempt from the end of the policy order.

        Raises:
            OutOfOrderError: The step has its blocks already, or there is no ask. The state is unchanged.
        """
        check_reserve(ask, self._last_step)
        self._last_step = ask.step
        assert self._max_step_tokens is None or ask.max_row_tokens <= self._max_step_tokens
        for request_id, computed in zip(ask.released, ask.released_computed, strict=True):
            self._drop(request_id, computed)
        for admit in ask.admits:
            self._learn(admit)
        short = self._note_progress(ask)
        rows = Rows(ask.token_budget)
        if not self._serve_all(ask, short, rows):
            self._serve_running(ask, rows)
        self._note_gains()
        if not rows.preempted:
            self._serve_waiting(ask, rows)
            self._note_gains()
        if ask.draft_ends:
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

    # --- updates --------------------------------------------------------------------------------------------------

    def _learn(self, admit: Admit) -> None:
        chain = self._chain(admit) if self._caching else None
        tables: list[list[int]] = [[] for _ in self.groups]
        read_cache = admit.read_cache and self._caching
        sequence = SequenceBlocks(
            admit.request_id, len(admit.token_ids), chain, read_cache, tables, [0] * len(self.groups)
        )
        self._sequences[admit.request_id] = sequence

    def _chain(self, admit: Admit) -> Chain:
        return Chain(self._secret, admit.salt, admit.token_ids, self._chunk_tokens)

    def _drop(self, request_id: int, computed: int) -> None:
        sequence = self._sequences.pop(request_id)
        if computed < 0:
            self._forget(sequence)
        elif computed >= sequence.register_at:
            self._register(sequence, computed)
        self._release_all(sequence)

    def _note_progress(self, ask: BlockAsk) -> list[int]:
        """Record what the last step sampled and computed, for all rows, before any of them can be preempted.

        Return the indices of the rows that have no slots for all tokens up to their ends.
        """
        sequences = self._sequences
        short: list[int] = []
        columns = zip(ask.request_ids, ask.computed, ask.new_token_ids, ask.ends, strict=True)
        for at, (request_id, computed, new, end) in enumerate(columns):
            sequence = sequences[request_id]
            if new:
                sequence.num_tokens += len(new)
                if sequence.chain is not None:
                    sequence.chain.tail += new
            if computed >= sequence.register_at:
                self._register(sequence, computed)
            if end > sequence.capacity:
                short.append(at)
        return short

    def _note_gains(self) -> None:
        gained, self._pool.num_gained = self._pool.num_gained, 0
        if gained and self._any_refused:
            self._any_refused = lower_needs(self._sequences.values(), gained)

    def _register(self, sequence: SequenceBlocks, computed: int) -> None:
        """Add the newly full blocks to the prefix cache, except those that left a window."""
        chain = sequence.chain
        assert chain is not None
        for group, table, live_from in zip(self.groups, sequence.tables, sequence.live_from, strict=True):
            size = group.block_size
            for at in range(max(sequence.registered // size, live_from), computed // size):
                self._pool.register(table[at], *chain.block(at, size), None if at else chain.salt)
        sequence.registered = computed - computed % self._chunk_tokens
        sequence.register_at = sequence.registered + self._chunk_tokens

    def _forget(self, sequence: SequenceBlocks) -> None:
        """Remove this sequence's blocks from the prefix cache: their contents are not reliable."""
        for table, live_from in zip(sequence.tables, sequence.live_from, strict=True):
            for block in table[live_from:]:
                self._pool.forget(block)

    # --- running rows ---------------------------------------------------------------------------------------------

    def _serve_all(self, ask: BlockAsk, short: list[int], rows: Rows) -> bool:
        """Serve all running rows at once, if budget and free blocks suffice for them, as in most steps.

        Return whether they do; else nothing has changed, and `_serve_running` decides row by row.
        """
        counts = list(map(sub, ask.ends, ask.starts))
        if sum(counts) > rows.budget or 0 in counts:
            return False
        growing = [(at, self._sequences[ask.request_ids[at]], ask.ends[at]) for at in short]
        if sum([sequence.missing(self.groups, end) for _, sequence, end in growing]) > self._pool.num_free:
            return False
        rows.add_all(ask.request_ids, ask.starts, counts)
        for at, sequence, end in growing:
            self._leave_windows(sequence, ask.computed[at])
            rows.new_blocks[at] = self._grow(sequence, end)
        return True

    def _serve_running(self, ask: BlockAsk, rows: Rows) -> None:
        sequences = self._sequences
        victims = list(ask.preempt_order)
        for request_id, computed, start, end in zip(ask.request_ids, ask.computed, ask.starts, ask.ends, strict=True):
            if rows.budget == 0:
                return
            if start == end or (rows.preempted and request_id in rows.preempted):
                continue
            count = min(end - start, rows.budget)
            sequence = sequences[request_id]
            if start + count <= sequence.capacity:
                rows.add(request_id, start, count, ())
                continue
            # Blocks of steps in flight are not in the prefix cache yet, so they must not be released.
            self._leave_windows(sequence, computed)
            if self._make_room(ask, sequence, start + count, victims, rows):
                rows.add(request_id, start, count, self._grow(sequence, start + count))

    def _make_room(self, ask: BlockAsk, sequence: SequenceBlocks, end: int, victims: list[int], rows: Rows) -> bool:
        """Preempt from the end of the policy order until the blocks are free; False if `sequence` was preempted."""
        missing = sequence.missing(self.groups, end)
        while missing > self._pool.num_free:
            victim = victims.pop()
            rows.preempt(victim)
            self._release_all(self._sequences[victim])
            self._sequences[victim].readmit_tokens = ask.ends[ask.request_ids.index(victim)]
            if victim == sequence.request_id:
                assert victims, f"sequence {victim} is longer than max_tokens()"
                return False
        return True

    def _leave_windows(self, sequence: SequenceBlocks, position: int) -> None:
        """Release the blocks that neither `position` nor a later position can see."""
        for index, group in enumerate(self.groups):
            live_from = sequence.live_from[index]
            visible = first_visible_block(group, position)
            if visible > live_from:
                table = sequence.tables[index]
                self._pool.release(table[live_from:visible])
                table[live_from:visible] = [NULL_BLOCK] * (visible - live_from)
                sequence.live_from[index] = visible

    def _grow(self, sequence: SequenceBlocks, end: int) -> NewBlocks:
        """Append blocks for the first `end` tokens to every table and return the appended ones."""
        grown: list[tuple[int, tuple[int, ...]]] = []
        for index, (group, table) in enumerate(zip(self.groups, sequence.tables, strict=True)):
            at = len(table)
            taken = self._pool.take(max(0, blocks_for(end, group) - at), index)
            table.extend(taken)
            grown.append((at, tuple(taken)))
        sequence.capacity = min(
            len(table) * group.block_size for group, table in zip(self.groups, sequence.tables, strict=True)
        )
        if sequence.reserved or sequence.capacity < sequence.admit_tokens:
            self._reserve_rest(sequence)
        return tuple(grown)

    def _reserve_rest(self, sequence: SequenceBlocks) -> None:
        """Reserve the free blocks that the tokens without slots can take at any time.

        What leaves a window until then becomes free for it to take, except blocks that others share.
        """
        num_tokens, rest = sequence.admit_tokens, 0
        for group, table, live_from in zip(self.groups, sequence.tables, sequence.live_from, strict=True):
            new = max(0, blocks_for(num_tokens, group) - len(table))
            if new and group.window is not None:
                own = sum([self._pool.references(block) == 1 for block in table[live_from:]])
                new = min(new, max_live_blocks(num_tokens, group, self._max_step_tokens) - own)
            rest += new
        self._reserved_blocks += rest - sequence.reserved
        sequence.reserved = rest

    def _release_all(self, sequence: SequenceBlocks) -> None:
        """Free a sequence's blocks, the last ones first, because other prompts share the first ones."""
        self._pool.release(sequence.held(self.groups))
        self._reserved_blocks -= sequence.reserved
        sequence.reset()

    # --- drafts ---------------------------------------------------------------------------------------------------

    def _serve_drafts(self, ask: BlockAsk, rows: Rows) -> None:
        """Allocate spare blocks and spare budget for drafts to the rows that compute their last known token.

        Drafts must not delay other work. Blocks are spare only if no sequence was preempted in this step, none waits
        for blocks, and none has them reserved.
        """
        drafts = zip(ask.drafts, ask.draft_ends, strict=True)
        drafts_of = dict(zip((*ask.request_ids, *ask.waiting), drafts, strict=True))
        computed = dict(zip(ask.request_ids, ask.computed, strict=True))
        has_spare = not rows.preempted and rows.num_admitted == len(ask.waiting)
        for at, request_id in enumerate(rows.request_ids):
            sequence, start = self._sequences[request_id], rows.starts[at]
            end, num_drafts = start + rows.counts[at], 0
            grown: NewBlocks = ()
            if end == sequence.num_tokens:
                num_drafts, draft_end = drafts_of[request_id]
                if has_spare and draft_end > sequence.capacity:
                    self._leave_windows(sequence, computed.get(request_id, start))
                    if sequence.missing(self.groups, draft_end) <= self._pool.num_free - self._reserved_blocks:
                        grown = self._grow(sequence, draft_end)
                num_drafts = min(num_drafts, rows.budget, sequence.capacity - end)
            rows.extend(at, num_drafts, grown, sequence.capacity)

    # --- waiting rows ---------------------------------------------------------------------------------------------

    def _serve_waiting(self, ask: BlockAsk, rows: Rows) -> None:
        for request_id in ask.waiting:
            if rows.budget == 0 or not self._admit(self._sequences[request_id], ask.max_row_tokens, rows):
                return

    def _admit(self, sequence: SequenceBlocks, max_row_tokens: int, rows: Rows) -> bool:
        """Admit a sequence if all its tokens fit into the blocks that are free and not reserved."""
        available = self._pool.num_free - self._reserved_blocks
        if sequence.needs > available:
            return False
        start, hits = self._find_hits(sequence)
        needs = self._needs(sequence.admit_tokens, start, hits)
        if needs > available:
            assert needs <= self._pool.total_blocks, f"sequence {sequence.request_id} is longer than max_tokens()"
            sequence.needs = needs
            self._any_refused = True
            return False
        sequence.needs = 0
        self._share(sequence, start, hits)
        count = min(sequence.num_tokens - start, max_row_tokens, rows.budget)
        self._grow(sequence, start + count)
        rows.add(sequence.request_id, start, count, tuple([(0, tuple(table)) for table in sequence.tables]))
        rows.num_admitted += 1
        if not sequence.was_admitted and sequence.read_cache:
            rows.queried_tokens += sequence.num_tokens
            rows.hit_tokens += start
        sequence.was_admitted = True
        return True

    def _find_hits(self, sequence: SequenceBlocks) -> tuple[int, list[list[int]]]:
        """Return the number of cached tokens, at most all but one, and per group the cached blocks that are visible."""
        chain = sequence.chain
        if chain is None or not sequence.read_cache:
            return 0, [[] for _ in self.groups]

        def find(index: int, at: int) -> int:
            return self._pool.find(index, *chain.block(at, self.groups[index].block_size))

        length = hit_length(self.groups, sequence.num_tokens - 1, find)
        return length, [
            [find(index, at) for at in range(first_visible_block(group, length), length // group.block_size)]
            for index, group in enumerate(self.groups)
        ]

    def _needs(self, num_tokens: int, start: int, hits: list[list[int]]) -> int:
        """Return the maximum number of free blocks that computing tokens `start` to `num_tokens` takes at any time."""
        needs = 0
        for group, blocks in zip(self.groups, hits, strict=True):
            idle = sum([self._pool.references(block) == 0 for block in blocks])
            new = blocks_for(num_tokens, group) - start // group.block_size
            needs += min(max_live_blocks(num_tokens, group, self._max_step_tokens), new + idle)
        return needs

    def _share(self, sequence: SequenceBlocks, start: int, hits: list[list[int]]) -> None:
        """Start the tables with the cached blocks, and with null blocks for those that left the window."""
        for index, (group, blocks) in enumerate(zip(self.groups, hits, strict=True)):
            for block in blocks:
                self._pool.share(block)
            skipped = start // group.block_size - len(blocks)
            sequence.tables[index] = [NULL_BLOCK] * skipped + blocks
            sequence.live_from[index] = skipped
        if sequence.chain is not None:
            sequence.registered = start
            sequence.register_at = start + self._chunk_tokens
