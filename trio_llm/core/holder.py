"""What the KV manager keeps of one sequence, and of the grant it is making."""

from __future__ import annotations

import sys

import attrs

from trio_llm.core.prefix import Chain

NewBlocks = tuple[tuple[int, tuple[int, ...]], ...]
"""Per KV group: index in the block table, block ids from there on; empty where a row has none."""

NEVER = sys.maxsize


@attrs.define(eq=False)
class Holder:
    """One sequence that the manager knows; it has blocks while it runs.

    Attributes:
        num_tokens: Tokens known, prompt and output.
        chain: Its keys in the prefix cache, None where there is no cache.
        read_cache: Whether its prompt may hit.
        tables: Per group, its blocks; only appended to while it runs.
        live_from: Per group, index of the first block it still owns; those before left the window.
        capacity: Tokens that have a slot in every group.
        registered: Tokens whose full blocks were offered to the prefix cache.
        register_at: The number of computed tokens at which there is one more to offer.
        reserved: Blocks that its admission counted on and that it has not taken yet.
        needs: Free blocks it needed when last refused; with fewer there is no use looking again.
        wanted: Where it was to get when it was preempted, which may be one token beyond those known; with less room it
            would be preempted again before it gets anywhere.
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
    wanted: int = 0
    was_admitted: bool = False

    def reset(self) -> None:
        """Forget its blocks, which are gone; where it stands is set anew when it is admitted again."""
        self.tables = [[] for _ in self.tables]
        self.register_at = NEVER
        self.reserved = self.needs = 0


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

    def extend(self, at: int, num_drafts: int, new_blocks: NewBlocks, capacity: int) -> None:
        """Let a row compute drafts as well, with blocks that come after those it was given before."""
        self.counts[at] += num_drafts
        self.budget -= num_drafts
        self.drafts.append(num_drafts)
        self.capacities.append(capacity)
        if new_blocks:
            given = self.new_blocks[at] or tuple([(first, ()) for first, _ in new_blocks])
            both = zip(given, new_blocks, strict=True)
            self.new_blocks[at] = tuple([(first, blocks + more) for (first, blocks), (_, more) in both])

    def preempt(self, request_id: int) -> None:
        """Note a victim; if it was granted a row before, the row is taken out and its tokens are free for others."""
        self.preempted.append(request_id)
        if request_id in self.request_ids:
            at = self.request_ids.index(request_id)
            self.budget += self.counts[at]
            for column in (self.request_ids, self.starts, self.counts, self.new_blocks):
                del column[at]
