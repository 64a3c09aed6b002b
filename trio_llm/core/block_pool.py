"""A pool of equal-sized blocks: reference counts, free blocks, and what free blocks still contain."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

import attrs

DIGEST_BYTES = 16
"""Length of the digests of the prefix cache."""

NULL_BLOCK = 0
"""In a block table, replaces a block that left the window. It is never allocated, written or read."""


@attrs.frozen
class Stored:
    """A block that entered the prefix cache.

    Attributes:
        content: Per chunk, the digest before it and its tokens.
        salt: That of its sequence, if it is the first block; None for later ones.
    """

    group: int
    digest: bytes
    content: bytes
    salt: bytes | None


@attrs.frozen
class Removed:
    """A block that left the prefix cache."""

    group: int
    digest: bytes


class BlockPool:
    """Reference counts, the free list in eviction order, and the map from content to block.

    The free list is a linked hash map, so taking from the front, adding at the back and removing from the middle
    are all O(1). A free block keeps its content until it is allocated again: eviction is lazy. Blocks that no prompt
    can hit are evicted first, then the least recently released ones.

    Attributes:
        moves: What entered and left the prefix cache, in order; None if nobody wants to know.
        num_gained: How often a block came to be cached and in use, so that a prompt can share it without a free block;
            set to 0 by who takes note of it.
    """

    def __init__(self, num_blocks: int, num_groups: int) -> None:
        self.total_blocks = num_blocks - 1
        self.used_blocks = [0] * num_groups
        self.cached_blocks = 0
        self.num_gained = 0
        self.moves: list[Stored | Removed] | None = None
        self._references = [0] * num_blocks
        self._group = [0] * num_blocks
        self._digest: list[bytes | None] = [None] * num_blocks
        self._content = [b""] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))
        self._cached: tuple[dict[bytes, int], ...] = tuple({} for _ in range(num_groups))
        # Per group: what a cached block follows -> the block, the last of several.
        self._after: tuple[dict[bytes, int], ...] = tuple({} for _ in range(num_groups))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, count: int, group: int) -> list[int]:
        """Allocate `count` free blocks with one reference each; their cached content is forgotten."""
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
            self.num_gained += 1
            self.used_blocks[self._group[block]] += 1
        self._references[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Drop one reference each. Blocks without references become free and are evicted in this order."""
        for block in blocks:
            self._references[block] -= 1
            if self._references[block] == 0:
                self.used_blocks[self._group[block]] -= 1
                self._free[block] = None
                if self._digest[block] is None:
                    self._free.move_to_end(block, last=False)
                else:
                    self.cached_blocks += 1

    def register(self, block: int, digest: bytes, content: bytes, salt: bytes | None = None) -> None:
        """Add this full, computed block to the prefix cache, unless another block has the same content.

        `salt` is that of its sequence, for the first block.
        """
        group = self._group[block]
        cached = self._cached[group]
        if digest not in cached:
            cached[digest] = block
            self.num_gained += 1
            self._digest[block] = digest
            self._content[block] = content
            self._after[group][content[:DIGEST_BYTES]] = block
            if self.moves is not None:
                self.moves.append(Stored(group, digest, content, salt))

    def find(self, group: int, digest: bytes, content: bytes) -> int:
        """Return the cached block of a group with this content, or the null block."""
        block = self._cached[group].get(digest, NULL_BLOCK)
        return block if block and self._content[block] == content else NULL_BLOCK

    def content_after(self, group: int, parent: bytes) -> bytes | None:
        """Return the content of a cached block that follows the chunk with this digest; None if there is none."""
        block = self._after[group].get(parent)
        return None if block is None else self._content[block]

    def forget(self, block: int) -> None:
        """Remove a block from the prefix cache."""
        digest = self._digest[block]
        if digest is not None:
            del self._cached[self._group[block]][digest]
            after, parent = self._after[self._group[block]], self._content[block][:DIGEST_BYTES]
            if after.get(parent) == block:
                del after[parent]
            self._digest[block] = None
            self._content[block] = b""
            if self.moves is not None:
                self.moves.append(Removed(self._group[block], digest))

    def references(self, block: int) -> int:
        return self._references[block]

    def all_references(self) -> tuple[int, ...]:
        """Return the reference count of every block, indexed by block id."""
        return tuple(self._references)

    def all_cached(self) -> tuple[bool, ...]:
        """Return whether each block is in the prefix cache, indexed by block id."""
        return tuple([digest is not None for digest in self._digest])

    def digest(self, block: int) -> bytes | None:
        """Return this block's key in the prefix cache; None if it is not cached."""
        return self._digest[block]

    def eviction_order(self) -> tuple[int, ...]:
        """Return the free blocks in the order in which they will be allocated."""
        return tuple(self._free)
