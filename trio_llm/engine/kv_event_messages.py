"""The form of vLLM's KV events on the wire, and what enters and leaves the prefix cache in that form.

A batch is an array, its events are maps with a `type`, in msgpack: vLLM 0.24 and later.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Sequence

import msgspec

from trio_llm.core.block_pool import DIGEST_BYTES, Removed, Stored
from trio_llm.model_info import KVGroup

_TOKEN_BYTES = array("I").itemsize
# vLLM's name of the cache that the model computes with. It says so on a CPU too, and routers rank caches by it.
_MEDIUM = "GPU"

Move = Stored | Removed


class KVCacheEvent(msgspec.Struct, omit_defaults=True, tag=True):
    """What happened to blocks of one KV group."""


class BlockStored(KVCacheEvent):
    """Consecutive blocks of one sequence entered the prefix cache.

    Attributes:
        block_hashes: One per block.
        parent_block_hash: That of the block before them; None if there is none.
        token_ids: Of all these blocks.
        block_size: Tokens in each.
        extra_keys: Per block, what its hash depends on besides tokens: the salt, for a sequence's first block.
    """

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple[str, ...] | None]
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None


class BlockRemoved(KVCacheEvent):
    """Blocks left the prefix cache."""

    block_hashes: list[int]
    medium: str | None
    group_idx: int | None = None


class AllBlocksCleared(KVCacheEvent):
    """The prefix cache is empty."""


Event = BlockStored | BlockRemoved | AllBlocksCleared


class EventBatch(msgspec.Struct, array_like=True, omit_defaults=True):
    """The events of one step; `ts` is Unix time in seconds."""

    ts: float
    events: list[Event]
    data_parallel_rank: int | None = None


def block_hash(digest: bytes) -> int:
    """Return the last 64 bits of a digest, as vLLM publishes them."""
    (value,) = struct.unpack(">Q", digest[-8:])
    return value


def events_of(moves: Iterable[Move], groups: Sequence[KVGroup]) -> list[Event]:
    """Return moves as events, in order. Blocks that follow one another share an event."""
    events: list[Event] = []
    chunk_tokens = min(group.block_size for group in groups)
    for move in moves:
        last = events[-1] if events else None
        if isinstance(move, Removed):
            if isinstance(last, BlockRemoved) and last.group_idx == move.group:
                last.block_hashes.append(block_hash(move.digest))
            else:
                events.append(BlockRemoved([block_hash(move.digest)], _MEDIUM, move.group))
            continue
        stored = _stored(move, groups[move.group], chunk_tokens)
        if isinstance(last, BlockStored) and _follows(stored, last):
            last.block_hashes += stored.block_hashes
            last.token_ids += stored.token_ids
            last.extra_keys += stored.extra_keys
        else:
            events.append(stored)
    return events


def _stored(move: Stored, group: KVGroup, chunk_tokens: int) -> BlockStored:
    chunk_bytes = DIGEST_BYTES + chunk_tokens * _TOKEN_BYTES
    tokens = array("I")
    for at in range(0, len(move.content), chunk_bytes):
        tokens.frombytes(move.content[at + DIGEST_BYTES : at + chunk_bytes])
    return BlockStored(
        [block_hash(move.digest)],
        block_hash(move.content[:DIGEST_BYTES]) if move.salt is None else None,
        tokens.tolist(),
        group.block_size,
        None,
        _MEDIUM,
        None,
        [(move.salt.hex(),) if move.salt else None],
        move.group,
        "full_attention" if group.window is None else "sliding_window",
        group.window,
    )


def _follows(stored: BlockStored, last: BlockStored) -> bool:
    return stored.group_idx == last.group_idx and stored.parent_block_hash == last.block_hashes[-1]
