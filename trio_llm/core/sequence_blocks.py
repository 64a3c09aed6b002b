"""The KV manager's state of one sequence, and the columns of the grant that it is making."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from operator import itemgetter

import attrs

from trio_llm.core.block_math import blocks_for
from trio_llm.core.prefix import Chain
from trio_llm.model_info import KVGroup

NewBlocks = tuple[tuple[int, tuple[int, ...]], ...]
"""Per KV group: index in the block table, and the block ids from there on. Empty if a row has none."""

NEVER = sys.maxsize


@attrs.define(eq=False)
class SequenceBlocks:
    """The KV manager's state of one sequence. It owns blocks while it runs.

    Attributes:
        num_tokens: Tokens known, prompt and output.
        chain: Its keys in the prefix cache; None if the cache is disabled.
        read_cache: Whether its prompt may use cached blocks.
        tables: Per group, its blocks. Only appended to while it runs.
        live_from: Per group, index of the first block that it still owns; earlier ones left the window.
        capacity: Number of tokens that have a slot in every group.
        registered: Number of tokens whose blocks were added to the prefix cache.
        register_at: Number of computed tokens at which the next block can be added.
        reserved: Blocks reserved for the tokens that it was admitted with and that have no slots yet.
        needs: Free blocks that it needed when it was last refused, less what the prefix cache gained since; with fewer,
            it is refused again at once.
        readmit_tokens: Length to have blocks for at the next admission: the target when it was preempted, which may be
            one token more than those known. With fewer it would be preempted again before it advances.
    """

    request_id: int
    num_tokens: int
    chain: Chain | None
    read_cache: bool
    tables: list[list[int]]
    live_from: list[int]
    capacity: int = 0
    registered: int = 0
    register_at: int = NEVER
    reserved: int = 0
    needs: int = 0
    readmit_tokens: int = 0
    was_admitted: bool = False

    @property
    def admit_tokens(self) -> int:
        """The number of tokens that it must have room for when it is admitted; until it samples one, the same."""
        return max(self.num_tokens, self.readmit_tokens)

    def missing(self, groups: Sequence[KVGroup], end: int) -> int:
        """Return how many more blocks it needs for its first `end` tokens."""
        missing = 0
        for group, table in zip(groups, self.tables, strict=True):
            missing += max(0, blocks_for(end, group) - len(table))
        return missing

    def held(self, groups: Sequence[KVGroup]) -> list[int]:
        """Return the blocks that it owns, the last ones first."""
        held = [
            (at * group.block_size, table[at])
            for group, table, live_from in zip(groups, self.tables, self.live_from, strict=True)
            for at in range(live_from, len(table))
        ]
        held.sort(key=itemgetter(0), reverse=True)
        return [block for _, block in held]

    def reset(self) -> None:
        """Forget its released blocks. The next admission sets the rest."""
        self.tables = [[] for _ in self.tables]
        self.register_at = NEVER
        self.reserved = self.needs = 0


def lower_needs(sequences: Iterable[SequenceBlocks], gained: int) -> bool:
    """Note that the prefix cache gained blocks, each of which may save a refused sequence one; return if there are any.

    That may be too much, which costs a look at the cache, or in rare cases too little until the next gain.
    """
    refused = [sequence for sequence in sequences if sequence.needs]
    for sequence in refused:
        sequence.needs = max(0, sequence.needs - gained)
    return bool(refused)


@attrs.define(eq=False)
class Rows:
    """The columns of a grant while it is being made."""

    budget: int
    request_ids: list[int] = attrs.field(factory=list[int])
    starts: list[int] = attrs.field(factory=list[int])
    counts: list[int] = attrs.field(factory=list[int])
    new_blocks: list[NewBlocks] = attrs.field(factory=list[NewBlocks])
    num_admitted: int = 0
    preempted: list[int] = attrs.field(factory=list[int])
    queried_tokens: int = 0
    hit_tokens: int = 0
    drafts: list[int] = attrs.field(factory=list[int])
    capacities: list[int] = attrs.field(factory=list[int])

    def add(self, request_id: int, start: int, count: int, new_blocks: NewBlocks) -> None:
        self.request_ids.append(request_id)
        self.starts.append(start)
        self.counts.append(count)
        self.new_blocks.append(new_blocks)
        self.budget -= count

    def add_all(self, request_ids: Sequence[int], starts: Sequence[int], counts: Sequence[int]) -> None:
        """Add rows without new blocks."""
        self.request_ids += request_ids
        self.starts += starts
        self.counts += counts
        self.new_blocks += [()] * len(counts)
        self.budget -= sum(counts)

    def extend(self, at: int, num_drafts: int, new_blocks: NewBlocks, capacity: int) -> None:
        """Add drafts to a row, and blocks after those that it already has."""
        self.counts[at] += num_drafts
        self.budget -= num_drafts
        self.drafts.append(num_drafts)
        self.capacities.append(capacity)
        if new_blocks:
            given = self.new_blocks[at] or tuple([(first, ()) for first, _ in new_blocks])
            both = zip(given, new_blocks, strict=True)
            self.new_blocks[at] = tuple([(first, blocks + more) for (first, blocks), (_, more) in both])

    def preempt(self, request_id: int) -> None:
        """Record a preempted sequence. If it has a row, remove the row and return its tokens to the budget."""
        self.preempted.append(request_id)
        if request_id in self.request_ids:
            at = self.request_ids.index(request_id)
            self.budget += self.counts[at]
            for column in (self.request_ids, self.starts, self.counts, self.new_blocks):
                del column[at]
