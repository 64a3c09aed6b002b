"""What the model says of itself: its description once it is loaded, and the progress of loading (floor 0)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import attrs


@attrs.frozen
class KVGroup:
    """Attention layers that share one block table.

    Attributes:
        layers: Indices of the layers that own KV storage in this group.
        block_size: Tokens per block. A power of two; groups of one model may differ (the layers of different
            head sizes share one pool of equal-sized blocks).
        window: Tokens visible to a query, itself included; None for all.
    """

    layers: tuple[int, ...]
    block_size: int
    window: int | None = None


@attrs.frozen(kw_only=True)
class ModelInfo:
    """What floors above the model know of it.

    Attributes:
        num_kv_blocks: Blocks in the pool, the null block 0 included.
        block_bytes: Bytes of one block over all the layers it serves.
        eos_token_ids: From generation_config, the primary one first.
        stored_formats: Format of the weights in the model's files -> bytes.
        kept_formats: Of these, format -> bytes of what is computed as stored.
        on_gpu: Whether steps run on a GPU, concurrently with the host.
        memory_table: Use of the memory, as lines of text; empty if it was not measured.
    """

    name: str
    architecture: str
    vocab_size: int
    hidden_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    kv_groups: tuple[KVGroup, ...]
    num_kv_blocks: int
    block_bytes: int
    dtype: str
    default_sampling: Mapping[str, float | int] = attrs.field(factory=dict[str, float | int])
    stored_formats: Mapping[str, int] = attrs.field(factory=dict[str, int])
    kept_formats: Mapping[str, int] = attrs.field(factory=dict[str, int])
    on_gpu: bool = False
    memory_table: str = attrs.field(default="", repr=False)


@attrs.frozen
class Progress:
    """How far loading is: `done` of `total`, counted in `unit`. `stage` is a few words for a human."""

    stage: str
    done: int
    total: int
    unit: Literal["tensors", "bytes", "steps", "parts", "ranks"] = "tensors"
