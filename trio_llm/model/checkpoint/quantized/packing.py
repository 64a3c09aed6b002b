"""Small integers packed into 32-bit words, and integers in groups that share a scale and a zero point.

Letters: N outputs, K inputs, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import attrs
import torch
from torch import Tensor

from trio_llm.errors import CheckpointError
from trio_llm.model.checkpoint.quantized.blocks import BlockShape, input_order, scales_of_blocks
from trio_llm.model.checkpoint.quantized.parts import Scheme
from trio_llm.model.ops.seam import Blocks


def unpack(words: Tensor, bits: int) -> Tensor:
    """Return the unsigned integers in int32 words [R, C], lowest bits first, as uint8 [R, C * 32 / bits].

    `bits` are 2, 4 or 8. Bytes are split, not words, so that an element takes one byte of memory. The host is
    little-endian.
    """
    stored = words.contiguous().view(torch.uint8)
    values = torch.empty(*stored.shape, 8 // bits, dtype=torch.uint8)
    for place in range(8 // bits):
        torch.bitwise_and(stored >> bits * place, (1 << bits) - 1, out=values[:, :, place])
    return values.flatten(1)


@attrs.frozen(eq=False)
class Grouped:
    """A matrix of unsigned integers: each weight is (value - zero) * scale, of its input's group.

    Attributes:
        bits: 2, 4 or 8.
        values: [N, K] uint8.
        scales: [N, G], or [1, 1].
        zeros: [N, G] uint8 or wider, or [1, 1]; None for half the range.
        groups: [K], each input's group; None for G equal ones, one after the other.
    """

    bits: int
    values: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    groups: Tensor | None = None

    def widen(self) -> Tensor:
        """Return float32 [N, K].

        Raises:
            CheckpointError: An input's group is not there.
        """
        inputs, count = self.values.shape[1], self.scales.shape[1]
        zeros = torch.full((1, count), 1 << (self.bits - 1)) if self.zeros is None else self.zeros
        zeros, scales = zeros.float(), self.scales.float()
        out = torch.empty(self.values.shape).copy_(self.values)
        groups = None if self.groups is None else self.groups.long()
        if groups is None or (inputs % count == 0 and torch.equal(groups, torch.arange(inputs) // (inputs // count))):
            # A quarter of the time of the general case.
            out.unflatten(1, (count, -1)).sub_(zeros[:, :, None]).mul_(scales[:, :, None])
            return out
        if int(groups.min()) < 0 or int(groups.max()) >= count:
            found = f"{int(groups.min())} to {int(groups.max())}"
            raise CheckpointError(f"groups of inputs are from {found}; there are {count}")
        return out.sub_(zeros.index_select(1, groups)).mul_(scales.index_select(1, groups))

    def blocks(self) -> Blocks:
        """Return the matrix as blocks, one group's inputs after the other's. The groups are of equal size."""
        outputs = len(self.values)
        order = input_order(self.groups)
        values = self.values if order is None else self.values.index_select(1, order)
        zeros = None if self.zeros is None else self.zeros.expand(outputs, -1)
        if self.bits == 8:
            weight = (values - 128).view(torch.int8)
            zero = None if zeros is None else (zeros - 128).to(torch.int8)
        else:
            # Blocks without zero points have 8.
            weight = Blocks.paired(values if zeros is not None else values + 8 - (1 << (self.bits - 1)))
            zero = None if zeros is None else zeros.to(torch.int8)
        return Blocks(weight, scales_of_blocks(self.scales, outputs), zero=zero, order=order)


def grouped_scheme(
    name: str, shape: tuple[int, int], unpacked: Callable[[Mapping[str, Tensor]], Grouped], blocks: BlockShape | None
) -> Scheme:
    """Return how a matrix is stored whose parts are unpacked to groups, and perhaps computed as blocks."""
    return Scheme(
        name,
        shape,
        widen=lambda parts: unpacked(parts).widen(),
        keep=lambda parts: unpacked(parts).blocks(),
        template=blocks and blocks.template,
    )
