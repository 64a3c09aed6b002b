"""The KV pool: which layer keeps its keys and values where, and the memory itself.

Knows attention layers, blocks and bytes; nothing of sequences. Layers of the same kind (window, heads, head
size) form groups of equal size; every group has its own block table, and all groups draw blocks of equal
bytes from one pool. A physical tensor is shared by one layer of each group: a block belongs to one group at a time.

Letters: L layers, N blocks, T tokens per block, Hkv heads, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import attrs
import torch
from torch import Tensor

from trio_llm.errors import UnsupportedError
from trio_llm.messages import KVGroup


@attrs.frozen(kw_only=True)
class AttentionSpec:
    """How one layer attends.

    Attributes:
        scale: Multiplies q.k before the softmax.
        window: Tokens visible to a query, itself included; None for all.
        softcap: Scores become softcap * tanh(score / softcap); None for none.
        kv_layer: The layer whose keys and values are read; another one's where layers share them.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    kv_layer: int
    window: int | None = None
    softcap: float | None = None


@attrs.frozen
class LayerKV:
    """One layer's keys and values, addressed by slot: block * slots_per_block + offset.

    Attributes:
        group: Index of the layer's KV group (its block table and slots in the batch).
        k, v: [N * slots_per_block, Hkv, D], in the model's dtype or int8.
        k_scale, v_scale: [N * slots_per_block, Hkv] float32 where k and v are int8, else None.
        slots_per_block: At least the group's block_size; more only where head sizes do not divide.
    """

    group: int
    k: Tensor
    v: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None
    slots_per_block: int


@attrs.frozen
class KVLayout:
    """Everything about the pool but its length.

    Attributes:
        specs: One per layer of the model.
        groups: What the block manager works with.
        group_of: Per layer, the index of the group it reads (for a sharing layer: the owner's).
        num_tensors: Physical tensors, each shared by one layer of each group.
        slots_per_block: Per group.
        plane_bytes: Bytes of one block's keys in one physical tensor (its values take as many).
        scale_bytes: Bytes of one block's key scales in one physical tensor; 0 unless int8.
        dtype: What is stored: the model's dtype, or torch.int8.
    """

    specs: tuple[AttentionSpec, ...]
    groups: tuple[KVGroup, ...]
    group_of: tuple[int, ...]
    num_tensors: int
    slots_per_block: tuple[int, ...]
    plane_bytes: int
    scale_bytes: int
    dtype: torch.dtype

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all the layers it serves, keys, values and scales."""
        return 2 * self.num_tensors * (self.plane_bytes + self.scale_bytes)

    @cached_property
    def used_bytes(self) -> tuple[int, ...]:
        """Per group, the bytes of a block that hold something; the rest of block_bytes is padding."""
        raise NotImplementedError


def plan_kv(specs: Sequence[AttentionSpec], *, block_size: int, dtype: torch.dtype) -> KVLayout:
    """Group the layers and choose block sizes so that all blocks have equal bytes.

    Args:
        specs: One per layer.
        block_size: Tokens per block of the group that stores most per token; the others get more.
        dtype: The model's dtype, or torch.int8.
    """
    raise NotImplementedError


class KVCache:
    """The pool's memory.

    Attributes:
        layers: Per layer of the model its LayerKV; a sharing layer has the owner's.
        nbytes: What was allocated.
    """

    layers: tuple[LayerKV, ...]
    nbytes: int

    def __init__(self, layout: KVLayout, num_blocks: int, device: torch.device) -> None:
        raise NotImplementedError
