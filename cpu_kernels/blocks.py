"""Blocks on a CPU: weights of 4 or 8 bits in groups of inputs that share a scale, packed for the products."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cpu_kernels import weight_memory
from cpu_kernels.library import DTYPES, kernels, loaded

OUTER = 256  # inputs that share an outer scale
_TYPES = {torch.uint8: 4, torch.int8: 5}  # codes of common.h


class BlockKind(NamedTuple):
    """How blocks are stored and scaled.

    Attributes:
        weight: uint8 for two 4-bit numbers in a byte, or int8.
        scale: float32, float16, or int8 for integers that are times an outer scale.
        offset: What is added to scale * number: 0 nothing (4-bit numbers less 8), 1 a zero point, 2 a minimum.
        group: Inputs of a group: 16, or a multiple of 32.
    """

    weight: torch.dtype
    scale: torch.dtype
    offset: int
    group: int

    @property
    def code(self) -> int:
        """The code of panels.h."""
        return _TYPES[self.weight] | DTYPES[self.scale] << 3 | self.offset << 5 | self.group << 8


# Numbers of a dtype, blocks, or int8 numbers that are multiplied by activations as they are, not rounded to 8 bits.
Kind = torch.dtype | BlockKind | Literal["int8_exact"]
_INT8_EXACT = 6  # of common.h


def code_of(kind: Kind) -> int:
    """Return the kernels' code of what a matrix holds."""
    if isinstance(kind, BlockKind):
        return kind.code
    return _INT8_EXACT if kind == "int8_exact" else DTYPES[kind]


def pack_blocks(
    weight: Tensor, scale: Tensor, *, zero: Tensor | None, minimum: Tensor | None, outer: Tensor | None
) -> tuple[Tensor, BlockKind]:
    """Lay out blocks for the kernels; return bytes [..., *] and what they hold.

    Args:
        weight: Bytes [..., N, K / 2] of two numbers from 0 to 15: input j of 32 in the low half of byte j of 16, input
            j + 16 in its high half. Or int8 [..., N, K].
        scale: [..., N, G] float32, float16, or int8.
        zero: [..., N, G] int8, subtracted from the numbers.
        minimum: [..., N, G] of scale's dtype, added.
        outer: [..., N, K / 256, 1 or 2] float16, by which int8 scales, and minima, are multiplied.
    """
    *leading, outputs, width = weight.shape
    inputs = width * (2 if weight.dtype == torch.uint8 else 1)
    offset = zero if zero is not None else minimum
    kind = BlockKind(
        weight.dtype, scale.dtype, 0 if offset is None else 1 if zero is not None else 2, inputs // scale.shape[-1]
    )
    packed = weight_memory.empty((*leading, loaded().packed_bytes(outputs, inputs, kind.code)))
    parts = [None if part is None else part.contiguous() for part in (weight, scale, offset, outer)]
    for index, out in enumerate(packed.view(-1, packed.shape[-1])):
        stored = [
            None if part is None else part.reshape(-1, outputs, *part.shape[len(leading) + 1 :])[index]
            for part in parts
        ]
        kernels()["pack_blocks"](*stored, out, outputs, inputs, kind.code)
    return packed, kind
