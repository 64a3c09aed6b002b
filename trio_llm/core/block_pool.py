"""One pool of equal-sized blocks: who owns how many references, what is free, what free blocks still hold."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

NULL_BLOCK = 0
"""Stands in a table where a window group no longer needs a block; never handed out, written or read."""


class BlockPool:
    """Reference counts, the free list in eviction order, and the map from content to block.

    The free list is a linked hash map, so taking from the front, adding at the back and removing from the middle
    are all O(1). A free block keeps its content until it is handed out again: eviction is lazy and
    least recently released first; blocks that no prompt can hit go before all others.
    """

    def __init__(self, num_blocks: int, num_groups: int) -> None:
        self.total_blocks = num_blocks - 1
        self.used_blocks = [0] * num_groups
        self.cached_blocks = 0
        self._references = [0] * num_blocks
        self._group = [0] * num_blocks
        self._digest: list[bytes | None] = [None] * num_blocks
        self._content = [b""] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))
        self._cached: tuple[dict[bytes, int], ...] = tuple({} for _ in range(num_groups))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, count: int, group: int) -> list[int]:
        """Hand out `count` free blocks, each with one reference, forgetting what they held."""
        taken: list[int] = []
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            if self._digest[block] is not None:
                self.cached_blocks -= 1
                self.forget(block)
            self._references[block] = 1
            self._group[block] = group
            taken.append(block)
        self.used_blocks[group] += count
        return taken

    def share(self, block: int) -> None:
        """Add a reference to a cached block, free or not."""
        if self._references[block] == 0:
            del self._free[block]
            self.cached_blocks -= 1
            self.used_blocks[self._group[block]] += 1
        self._references[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Drop one reference each; those that reach zero become free, the first one to be evicted first."""
        for block in blocks:
            self._references[block] -= 1
            if self._references[block] == 0:
                self.used_blocks[self._group[block]] -= 1
                self._free[block] = None
                if self._digest[block] is None:
                    self._free.move_to_end(block, last=False)
                else:
                    self.cached_blocks += 1

    def register(self, block: int, digest: bytes, content: bytes) -> None:
        """Let prompts hit this full, computed block, unless another block already holds the same."""
        known = self._cached[self._group[block]]
        if digest not in known:
            known[digest] = block
            self._digest[block] = digest
            self._content[block] = content

    def find(self, group: int, digest: bytes, content: bytes) -> int:
        """Return the block of a group with this content, or the null block."""
        block = self._cached[group].get(digest, NULL_BLOCK)
        return block if block and self._content[block] == content else NULL_BLOCK

    def forget(self, block: int) -> None:
        """Let no later prompt hit an owned block."""
        digest = self._digest[block]
        if digest is not None:
            del self._cached[self._group[block]][digest]
            self._digest[block] = None
            self._content[block] = b""

    def references(self, block: int) -> int:
        return self._references[block]

    def digest(self, block: int) -> bytes | None:
        """Return the key under which prompts find this block, None where they cannot."""
        return self._digest[block]

    def eviction_order(self) -> tuple[int, ...]:
        """Return the free blocks, the next one to be handed out first."""
        return tuple(self._free)
