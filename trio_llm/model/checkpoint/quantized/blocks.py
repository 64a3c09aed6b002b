"""Quantised matrices as the blocks that kernels multiply by, every weight exactly as stored.

Letters: N outputs, K inputs, G groups.
"""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from trio_llm.model.checkpoint.quantized.parts import Parts
from trio_llm.model.checkpoint.tensors import FLOATS
from trio_llm.model.ops.seam import Blocks


@attrs.frozen
class BlockShape:
    """What a matrix is as blocks, from its headers.

    Attributes:
        shape: N and K.
        bits: 4 or 8.
        count: G.
        scale: The type of the scales.
        has_zeros: Whether it has zero points.
        is_ordered: Whether its groups are not one after the other.
    """

    shape: tuple[int, int]
    bits: int
    count: int
    scale: torch.dtype
    has_zeros: bool
    is_ordered: bool

    def template(self) -> Blocks:
        """Return the blocks without their values, on the meta device."""
        outputs, inputs = self.shape
        weight = (outputs, inputs // 2) if self.bits == 4 else (outputs, inputs)
        groups = (outputs, self.count)
        return Blocks(
            torch.empty(weight, dtype=torch.uint8 if self.bits == 4 else torch.int8, device="meta"),
            torch.empty(groups, dtype=self.scale, device="meta"),
            zero=torch.empty(groups, dtype=torch.int8, device="meta") if self.has_zeros else None,
            order=torch.empty(inputs, dtype=torch.int64, device="meta") if self.is_ordered else None,
        )


def block_shape(
    parts: Parts,
    shape: tuple[int, int],
    bits: int,
    count: int,
    *,
    scale: str,
    has_zeros: bool,
    groups: Tensor | None = None,
) -> BlockShape | None:
    """Return what a matrix is as blocks; None if kernels cannot use it so, and it has to be widened.

    Args:
        bits: 2, 4 or 8; those of 2 are stored in 4.
        scale: The name of the scales.
        groups: [K], each input's group; None for G equal ones, one after the other.
    """
    inputs = shape[1]
    size = inputs // count
    # Activations are rounded to 8 bits in runs of 32, which groups must not cut unless they are half of one.
    if inputs % count or inputs % 32 or (size != 16 and size % 32) or parts.dtype(scale) not in FLOATS:
        return None
    if groups is not None and not torch.equal(groups.sort().values.long(), torch.arange(inputs) // size):
        return None
    kept = torch.float16 if parts.dtype(scale) == "F16" else torch.float32
    is_ordered = input_order(groups) is not None
    return BlockShape(shape, 8 if bits == 8 else 4, count, kept, has_zeros, is_ordered)


def input_order(groups: Tensor | None) -> Tensor | None:
    """Return the order [K] in which each group's inputs come one after the other; None if they do in their own."""
    if groups is None:
        return None
    order = groups.argsort(stable=True)
    return None if torch.equal(order, torch.arange(len(order))) else order


def scales_of_blocks(scales: Tensor, outputs: int) -> Tensor:
    """Return scales [N, G] in a type that blocks have, from [N, G] or [1, 1]."""
    kept = scales if scales.dtype == torch.float16 else scales.float()
    return kept.expand(outputs, -1).contiguous()
