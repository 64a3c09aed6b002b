"""The KV pool: its layout over layers, and its memory.

It knows attention layers, blocks and bytes, not sequences. Layers of the same kind (window, heads, head
size) form groups of equal size; every group has its own block table, and all groups draw blocks of equal
bytes from one pool. A physical tensor is shared by one layer of each group: a block belongs to one group at a time.

Letters: L layers, N blocks, T tokens per block, Hkv heads, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from trio_llm.model_info import KVGroup

SCALE_DTYPE = torch.float32


@attrs.frozen(kw_only=True)
class AttentionSpec:
    """How one layer attends.

    Attributes:
        scale: Multiplies q.k before the softmax.
        window: Tokens visible to a query, itself included; None for all.
        softcap: Scores become softcap * tanh(score / softcap); None for none.
        kv_layer: The layer that owns the keys and values: itself, or the one that it shares with.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    kv_layer: int
    window: int | None = None
    softcap: float | None = None


@attrs.frozen(eq=False)
class LayerKV:
    """One layer's keys and values, addressed by slot: block * block_size + offset.

    Attributes:
        group: Index of the layer's KV group (its block table and slots in the batch).
        k, v: [N * T, Hkv, D], in the model's dtype, int8 or float8_e4m3fn. The last two dimensions are dense.
        k_scale, v_scale: [N * T, Hkv] float32 if k and v have 8 bits (value = number * scale), else None.
    """

    group: int
    k: Tensor
    v: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None


@attrs.frozen
class KVLayout:
    """The pool's layout, without its number of blocks.

    Attributes:
        specs: One per layer of the model.
        groups: For the block manager.
        num_tensors: Physical tensors, each shared by one layer of each group.
        plane_size: Entries of one block's keys in one physical tensor (its values take as many).
        scale_size: Entries of one block's key scales in one physical tensor; 0 unless they have 8 bits.
        dtype: Of the stored values: the model's dtype, torch.int8 or torch.float8_e4m3fn.
    """

    specs: tuple[AttentionSpec, ...]
    groups: tuple[KVGroup, ...]
    num_tensors: int
    plane_size: int
    scale_size: int
    dtype: torch.dtype

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all the layers it serves: keys, values and scales."""
        plane_bytes = self.plane_size * self.dtype.itemsize + self.scale_size * SCALE_DTYPE.itemsize
        return 2 * self.num_tensors * plane_bytes

    def used_bytes(self, group: int) -> int:
        """Return the bytes of a block that `group` uses; the rest is padding."""
        spec = self.specs[self.groups[group].layers[0]]
        entry_bytes = spec.head_dim * self.dtype.itemsize + (SCALE_DTYPE.itemsize if self.scale_size else 0)
        layers, tokens = len(self.groups[group].layers), self.groups[group].block_size
        return 2 * layers * tokens * spec.num_kv_heads * entry_bytes


def plan_kv(specs: Sequence[AttentionSpec], *, block_size: int, dtype: torch.dtype) -> KVLayout:
    """Group the layers and choose block sizes so that all blocks have equal bytes.

    The group that stores most per token gets `block_size` tokens a block, the others the largest power-of-two
    multiple that fits.

    Args:
        specs: One per layer.
        dtype: The model's dtype, torch.int8 or torch.float8_e4m3fn.
    """
    kinds: dict[tuple[int | None, int, int], list[int]] = {}
    for layer, spec in enumerate(specs):
        if spec.kv_layer == layer:
            kinds.setdefault((spec.window, spec.num_kv_heads, spec.head_dim), []).append(layer)
    group_size = _group_size([len(layers) for layers in kinds.values()])
    largest = block_size * max(heads * head_dim for _, heads, head_dim in kinds)
    groups: list[KVGroup] = []
    for (window, heads, head_dim), layers in kinds.items():
        tokens = block_size
        while 2 * tokens * heads * head_dim <= largest:
            tokens *= 2
        num_groups = math.ceil(len(layers) / group_size)
        groups += [KVGroup(tuple(layers[i::num_groups]), tokens, window) for i in range(num_groups)]
    scales = max(group.block_size * specs[group.layers[0]].num_kv_heads for group in groups)
    most_tokens = max(group.block_size for group in groups)  # a power-of-two multiple of every other block size
    return KVLayout(
        specs=tuple(specs),
        groups=tuple(groups),
        num_tensors=max(len(group.layers) for group in groups),
        plane_size=_round_up(largest, most_tokens),
        scale_size=_round_up(scales, most_tokens) if dtype.itemsize == 1 else 0,
        dtype=dtype,
    )


def _group_size(counts: Sequence[int]) -> int:
    """Choose layers per group: the smallest or largest count of a kind, whichever leaves fewer layers of padding."""

    def padding(size: int) -> int:
        return sum(math.ceil(count / size) * size - count for count in counts)

    return min((max(counts), min(counts)), key=padding)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


class KVCache:
    """The pool's memory. Fresh slots hold arbitrary bytes; attention never reads a slot that was not written.

    Attributes:
        layers: Per layer of the model its LayerKV; a sharing layer has the owner's.
        nbytes: Allocated bytes.
    """

    layers: tuple[LayerKV, ...]
    nbytes: int

    def __init__(self, layout: KVLayout, num_blocks: int, device: torch.device) -> None:
        self.nbytes = 0
        planes = [self._plane(layout, num_blocks, device) for _ in range(layout.num_tensors)]
        owned: dict[int, LayerKV] = {}
        for index, group in enumerate(layout.groups):
            for plane, layer in zip(planes, group.layers, strict=False):
                spec, tokens = layout.specs[layer], group.block_size
                k, v = (_slots(part, num_blocks * tokens, spec.num_kv_heads, spec.head_dim) for part in plane[:2])
                scales = [_slots(part, num_blocks * tokens, spec.num_kv_heads) for part in plane[2:]]
                owned[layer] = LayerKV(index, k, v, *(scales or (None, None)))
        self.layers = tuple(owned[spec.kv_layer] for spec in layout.specs)

    def _plane(self, layout: KVLayout, num_blocks: int, device: torch.device) -> list[Tensor]:
        """Allocate keys, values and (of 8 bits) their scales of one physical tensor."""
        parts = [torch.empty(num_blocks * layout.plane_size, dtype=layout.dtype, device=device) for _ in range(2)]
        if layout.scale_size:
            scale = (num_blocks * layout.scale_size,)
            parts += [torch.empty(scale, dtype=SCALE_DTYPE, device=device) for _ in range(2)]
        self.nbytes += sum(part.nbytes for part in parts)
        return parts


def _slots(flat: Tensor, num_slots: int, *shape: int) -> Tensor:
    """View a plane as [num_slots, *shape]; the slot stride exceeds the slot size if head sizes do not divide."""
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return flat.as_strided((num_slots, *shape), (flat.numel() // num_slots, *strides))
