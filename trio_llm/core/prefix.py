"""The keys of the prefix cache, and how much of a prompt is cached.

A chain has one digest per chunk of tokens. Each digest includes the previous one, so it identifies its chunk and
everything before it. A block's key is the digest at its end, whatever the block's size.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from hashlib import blake2b

import attrs

from trio_llm.core.block_math import first_visible_block
from trio_llm.core.block_pool import DIGEST_BYTES
from trio_llm.model_info import KVGroup

_MAX_SHOWN_TOKENS = 32

Find = Callable[[int, int], int]
"""(group, index in its table) -> id of the block that holds it, 0 if none."""


@attrs.frozen
class Difference:
    """Where a prompt leaves what is cached: from `position` on, its tokens and those of a cached block differ.

    The columns have at most 32 tokens; either is empty if its tokens end there.
    """

    position: int
    token_ids: tuple[int, ...]
    cached_token_ids: tuple[int, ...]


class Chain:
    """Digests of a growing token sequence at every multiple of `chunk_tokens`.

    The hash is keyed with a secret of the process, so a client cannot build two prompts with the same digest. The
    content (parent digest and tokens) is stored and compared on a hit, so a collision cannot return wrong KV.
    """

    __slots__ = ("_chunk_tokens", "_contents", "_digests", "_hash", "_root", "salt", "tail")

    def __init__(self, secret: bytes, salt: bytes, token_ids: Sequence[int], chunk_tokens: int) -> None:
        self.tail = list(token_ids)
        """Tokens not hashed yet. The sequence grows by appending here; `block` hashes them."""
        self.salt = salt
        self._hash = blake2b(key=secret, digest_size=DIGEST_BYTES)
        self._chunk_tokens = chunk_tokens
        self._root = self._digest(salt)
        self._digests: list[bytes] = []
        self._contents: list[bytes] = []

    def block(self, index: int, block_size: int) -> tuple[bytes, bytes]:
        """Return digest and content of the block with this index in a table of blocks of `block_size` tokens."""
        if len(self.tail) >= self._chunk_tokens:
            self._digest_tail()
        ratio = block_size // self._chunk_tokens
        if ratio == 1:
            return self._digests[index], self._contents[index]
        end = (index + 1) * ratio
        return self._digests[end - 1], b"".join(self._contents[end - ratio : end])

    def parent(self, index: int) -> bytes:
        """Return the digest before the chunk with this index."""
        return self._digests[index - 1] if index else self._root

    def chunk(self, index: int) -> tuple[int, ...]:
        """Return the tokens of a chunk, as far as they are known."""
        if index < len(self._contents):
            return chunk_tokens(self._contents[index])
        return tuple(self.tail[: self._chunk_tokens]) if index == len(self._contents) else ()

    @property
    def digests(self) -> Sequence[bytes]:
        """The digests that were needed so far, of the first chunks; only appended to."""
        return self._digests

    def _digest(self, content: bytes) -> bytes:
        state = self._hash.copy()
        state.update(content)
        return state.digest()

    def _digest_tail(self) -> None:
        tail, size = self.tail, self._chunk_tokens
        parent = self._digests[-1] if self._digests else self._root
        full = len(tail) - len(tail) % size
        for at in range(0, full, size):
            content = parent + array("I", tail[at : at + size]).tobytes()
            parent = self._digest(content)
            self._contents.append(content)
            self._digests.append(parent)
        del tail[:full]


def chunk_tokens(content: bytes) -> tuple[int, ...]:
    """Return the tokens of a chunk, from its content."""
    return tuple(array("I", content[DIGEST_BYTES:]))


def difference(chain: Chain, index: int, chunk_size: int, cached: bytes) -> Difference | None:
    """Return where a sequence's chunk differs from the content of a cached one after the same chunks."""
    own, other = chain.chunk(index), chunk_tokens(cached)
    same = next((at for at, (one, two) in enumerate(zip(own, other, strict=False)) if one != two), len(own))
    if same == len(other):
        return None
    end = same + _MAX_SHOWN_TOKENS
    return Difference(index * chunk_size + same, own[same:end], other[same:end])


def hit_length(groups: Sequence[KVGroup], limit: int, find: Find) -> int:
    """Return how many of the first `limit` tokens are cached in every group.

    A full-attention group needs all blocks from the start, a window group only those that the next query sees. A
    shorter length moves the window to other blocks, so the length is reduced until all groups agree (a fixed point).
    The result is a multiple of every block size, because the block after it is written and must not be shared.
    """
    step = max(group.block_size for group in groups)
    length = limit // step * step
    for index, group in enumerate(groups):
        if group.window is None:
            length = _run_from_start(index, group, length, find) // step * step
    agreed = -1
    while length != agreed:
        agreed = length
        for index, group in enumerate(groups):
            if group.window is not None:
                length = _window_hit(index, group, length, step, find)
    return length


def _run_from_start(index: int, group: KVGroup, limit: int, find: Find) -> int:
    for at in range(limit // group.block_size):
        if not find(index, at):
            return at * group.block_size
    return limit


def _window_hit(index: int, group: KVGroup, limit: int, step: int, find: Find) -> int:
    """Return the longest multiple of `step`, at most `limit`, whose window is cached; each block is looked up once."""
    length, size = limit, group.block_size
    first_cached = length // size  # Blocks from here to the end of the window are cached.
    while first_cached > first_visible_block(group, length):
        if find(index, first_cached - 1):
            first_cached -= 1
        else:
            length = (first_cached - 1) * size // step * step
            first_cached = length // size
    return length
