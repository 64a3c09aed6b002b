"""The prefix cache's keys, and how far a prompt is already computed.

A chain has one digest per chunk of tokens, each made from the one before it, so a digest names its chunk
together with everything in front of it. A block is found under the digest at its end, whatever its size.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from hashlib import blake2b

from trio_llm.core.block_math import first_visible_block
from trio_llm.messages import KVGroup

DIGEST_BYTES = 16

Find = Callable[[int, int], int]
"""(group, index in its table) -> id of the block that holds it, 0 if none."""


class Chain:
    """Digests of a growing token sequence at every multiple of `chunk_tokens`.

    Keyed with a secret of the process, so that nobody outside can build two prompts that share a digest; the
    content (parent digest and tokens) is kept and compared on a hit, so not even luck can serve the wrong KV.
    """

    __slots__ = ("_chunk_tokens", "_contents", "_digests", "_hash", "_root", "tail")

    def __init__(self, secret: bytes, salt: bytes, token_ids: Sequence[int], chunk_tokens: int) -> None:
        self.tail = list(token_ids)
        """Tokens not digested yet. The sequence grows by appending here; digests are made when a block is asked for."""
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


def hit_length(groups: Sequence[KVGroup], limit: int, find: Find) -> int:
    """Return how many of the first `limit` tokens are cached in every group.

    A full group needs all blocks from the start; a window group only those that the next query sees. A shorter
    length moves the window to other blocks, so lengths go down until all groups agree: the fixed point. The result is
    a multiple of every block size, because the block after it is written to and must not be shared.
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
    known = length // size  # Blocks from here to the end of the window are cached.
    while known > first_visible_block(group, length):
        if find(index, known - 1):
            known -= 1
        else:
            length = (known - 1) * size // step * step
            known = length // size
    return length
