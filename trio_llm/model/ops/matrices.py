"""The kinds of weights that operations multiply by.

Letters: N outputs, K inputs, E experts, I expert width, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import product
from typing import Any, Literal

import attrs
import torch
from torch import Tensor

Activation = Literal["silu", "gelu_tanh"]


@attrs.frozen(eq=False)
class Dense:
    """A weight in the model's dtype: weight [N, K] (experts [E, N, K]), bias [N] or None."""

    weight: Tensor
    bias: Tensor | None = None


@attrs.frozen(eq=False)
class Int8:
    """A weight of one scale per output channel: weight [N, K] int8 * scale [N] (experts [E, N, K] and [E, N]).

    Attributes:
        exact: Multiply by activations as they are; else kernels may round them to 8 bits.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None = None
    exact: bool = False


@attrs.frozen(eq=False)
class Blocks:
    """A weight of 4 or 8 bits: numbers in groups of inputs that share a scale, and perhaps an offset.

    Attributes:
        weight: Bytes [N, K / 2] of two numbers from 0 to 15: input j of 32 in the low half of byte j of 16, input
            j + 16 in its high half. Or int8 [N, K]. Experts have one dimension more, here and below.
            Or float8_e4m3fn [N, K], with one group, or groups of 128 whose scales 128 outputs share.
        scale: [N, G] float32 or float16, for G groups of K / G inputs; or int8, integers that are times `outer`.
        zero: [N, G] int8, subtracted from the numbers before they are scaled.
        minimum: [N, G] of scale's dtype, added afterwards. With neither, 4-bit numbers have the zero point 8.
        outer: [N, K / 256, 1 or 2] float16, the outer scales of integer scales and minima.
        order: [K] int64, which input of the model each input of the weight is; None if they are the same.
        bias: [N] or None.
    """

    weight: Tensor
    scale: Tensor
    zero: Tensor | None = None
    minimum: Tensor | None = None
    outer: Tensor | None = None
    order: Tensor | None = None
    bias: Tensor | None = None

    @staticmethod
    def paired(numbers: Tensor) -> Tensor:
        """Return numbers [..., K] from 0 to 15 (uint8) as bytes of two [..., K / 2]."""
        runs = numbers.unflatten(-1, (-1, 32))
        return (runs[..., :16] | runs[..., 16:] << 4).flatten(-2)

    @property
    def inputs(self) -> int:
        """K."""
        return self.weight.shape[-1] * (2 if self.weight.dtype == torch.uint8 else 1)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors but the bias."""
        return sum(part.nbytes for part in (*self._parts.values(), self.order) if part is not None)

    @property
    def _parts(self) -> dict[str, Tensor]:
        """What is stored for each output."""
        found = {name: getattr(self, name) for name in ("weight", "scale", "zero", "minimum", "outer")}
        return {name: part for name, part in found.items() if part is not None}

    def to(self, device: torch.device) -> Blocks:
        """Return the blocks on a device."""
        own = {name: part.to(device) for name, part in self._parts.items()}
        order, bias = (None if part is None else part.to(device) for part in (self.order, self.bias))
        return Blocks(**own, order=order, bias=bias)

    def rows(self, index: slice | Tensor) -> Blocks:
        """Return some of the outputs; the bias is left out. Of experts, return some of these."""
        return Blocks(**{name: part[index] for name, part in self._parts.items()}, order=self.order)

    def columns(self, begin: int, end: int) -> Blocks:
        """Return some of the inputs, whole groups (and whole outer ones) of them or of the only one, without the bias.

        With an order they are those from `begin` to `end` in the weight's own order.
        """
        inputs = self.inputs
        parts: dict[str, Tensor] = {}
        for name, part in self._parts.items():
            dim = part.dim() - (2 if name == "outer" else 1)
            if part.shape[dim] == 1 and name != "outer":  # all inputs share it
                parts[name] = part
                continue
            bounds = [at * part.shape[dim] / inputs for at in (begin, end)]
            assert all(bound.is_integer() for bound in bounds), "inputs are divided at the bounds of groups"
            parts[name] = part.narrow(dim, int(bounds[0]), int(bounds[1] - bounds[0]))
        return Blocks(**parts, order=None if self.order is None else self.order[begin:end])

    @property
    def is_fp8(self) -> bool:
        """Whether numbers are floats of 8 bits."""
        return self.weight.dtype == torch.float8_e4m3fn

    def can_divide(self, count: int) -> bool:
        """Return whether rows can be looked up, and whether `divided` leaves groups whole."""
        smallest = self.scale if self.outer is None else self.outer
        return not self.is_fp8 and self.order is None and smallest.shape[1] % count == 0

    def divided(self, count: int) -> Blocks:
        """Return [N * count, K / count]: each output's inputs in parts that are outputs of their own."""
        parts = {name: part.reshape(-1, part.shape[1] // count, *part.shape[2:]) for name, part in self._parts.items()}
        return Blocks(**parts)

    def fits(self, other: Blocks) -> bool:
        """Return whether both can be fused: the same format, size of groups and order of inputs."""
        ours, theirs = self._parts, other._parts
        if ours.keys() != theirs.keys() or any(part.dtype != theirs[name].dtype for name, part in ours.items()):
            return False
        if any(part.shape[1:] != theirs[name].shape[1:] for name, part in ours.items()):
            return False
        if self.order is None or other.order is None:
            return self.order is other.order
        return self.order.is_meta or torch.equal(self.order, other.order)

    @classmethod
    def fused(cls, matrices: Sequence[Blocks]) -> Blocks:
        """Return matrices that fit, one's outputs after the other's."""
        if len(matrices) == 1:
            return matrices[0]
        joined = cls.gathered(sum(len(matrix.weight) for matrix in matrices), matrices)
        return attrs.evolve(joined, order=matrices[0].order)

    @classmethod
    def gathered(cls, count: int, matrices: Iterable[Blocks]) -> Blocks:
        """Return `count` outputs, from matrices that fit and have no order, each read when the last one is copied."""
        parts: dict[str, Tensor] = {}
        begin = 0
        for matrix in matrices:
            for name, part in matrix._parts.items():
                out = parts.setdefault(name, part.new_empty(count, *part.shape[1:]))
                out[begin : begin + len(part)] = part
            begin += len(matrix.weight)
        return cls(**parts)

    @classmethod
    def of_experts(cls, count: int, matrices: Iterable[Blocks]) -> Blocks:
        """Return experts [E, N, K] from matrices that fit and have no order, each read when the last one is copied."""
        parts: dict[str, Tensor] = {}
        for index, matrix in enumerate(matrices):
            for name, part in matrix._parts.items():
                parts.setdefault(name, part.new_empty(count, *part.shape))[index] = part
        return cls(**parts)


@attrs.frozen(eq=False)
class Panels:
    """A weight in the layout of the native CPU kernels; only they can read it.

    Attributes:
        weight: Bytes [*], experts [E, *].
        shape: N and K.
        kind: What the weight holds: numbers of a dtype, the model's or int8, or the kernels' name of others.
        scale: [N] float32 (experts [E, N]) for int8, else None.
        bias: [N] float32 or None.
        order: As in Blocks.
    """

    weight: Tensor
    shape: tuple[int, int]
    kind: Any
    scale: Tensor | None = None
    bias: Tensor | None = None
    order: Tensor | None = None


@attrs.frozen(eq=False)
class Tiles:
    """4-bit blocks in the layout of the CUDA kernels: tiles of 32 outputs by 32 inputs, see gemm_w4.cu.

    Attributes:
        weight: [N / 32, K / 32, 32, 4] int32.
        scale: [N / 32, G, 8, 4] for G groups. zero, minimum: the same, as in Blocks.
        order, bias: As in Blocks.
    """

    weight: Tensor
    scale: Tensor
    zero: Tensor | None = None
    minimum: Tensor | None = None
    order: Tensor | None = None
    bias: Tensor | None = None

    @staticmethod
    def can_hold(matrix: Blocks) -> bool:
        """Return whether a matrix has 4 bits, whole tiles, and groups of whole tiles without outer scales."""
        size = matrix.inputs // matrix.scale.shape[-1]
        return matrix.weight.dtype == torch.uint8 and len(matrix.weight) % 32 == size % 32 == 0 and matrix.outer is None

    @classmethod
    def of(cls, matrix: Blocks) -> Tiles:
        """Lay out a matrix [N, K] that can be held."""
        # Output 32 T + 16 i + 8 r + g. Byte 8 h + 2 t + e of 16 has these inputs of a tile, and those 16 further on.
        stored = matrix.weight.view(-1, 2, 2, 8, matrix.inputs // 32, 2, 4, 2)  # [T, i, r, g, tile, h, t, e]
        weight = stored.new_zeros(len(stored), stored.shape[4], 8, 4, 2, 2, dtype=torch.int32)
        for r, h, e in product(range(2), repeat=3):
            both = stored[:, :, r, :, :, h, :, e].permute(0, 3, 2, 4, 1)  # [T, tile, g, t, i]
            weight[..., 0] |= (both & 0xF).int() << 4 * (r + 2 * h + 4 * e)
            weight[..., 1] |= (both >> 4).int() << 4 * (r + 2 * h + 4 * e)
        scale, zero, minimum = (_tiled(part) for part in (matrix.scale, matrix.zero, matrix.minimum))
        assert scale is not None
        weight = weight.flatten(2).unflatten(2, (32, 4))
        return cls(weight, scale, zero=zero, minimum=minimum, order=matrix.order, bias=matrix.bias)

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        return 32 * self.weight.shape[0], 32 * self.weight.shape[1]

    def rows(self, index: slice | Tensor) -> Blocks:
        """Return some of the outputs as blocks; the bias is left out."""
        if isinstance(index, slice):
            index = torch.arange(*index.indices(self.shape[0]), device=self.weight.device)
        tile, j, g = index // 32, index // 8 % 4, index % 8
        words = self.weight.unflatten(2, (8, 4)).unflatten(4, (2, 2)).permute(0, 2, 4, 1, 3, 5)[tile, g, j // 2]
        # [..., tile, t, s] to [..., tile, h, t, e, s]
        places = 8 * torch.arange(4, device=index.device).view(2, 1, 2, 1).transpose(0, 2)  # [[0, 16], [8, 24]]
        shifts = 4 * (j % 2)[(..., *[None] * 5)] + places
        numbers = words[..., None, :, None, :] >> shifts.int() & 0xF
        weight = (numbers[..., 0] | numbers[..., 1] << 4).to(torch.uint8).flatten(-4)
        scale, zero, minimum = (
            None if part is None else part.permute(0, 2, 3, 1)[tile, g, j]
            for part in (self.scale, self.zero, self.minimum)
        )
        assert scale is not None
        return Blocks(weight, scale, zero=zero, minimum=minimum, order=self.order)


def _tiled(part: Tensor | None) -> Tensor | None:
    """Return what groups have [N, G] in the layout of Tiles."""
    return None if part is None else part.view(-1, 4, 8, part.shape[1]).permute(0, 3, 2, 1).contiguous()


@attrs.frozen(eq=False)
class Fp8:
    """An FP8 weight as torch's scaled product takes it.

    Attributes:
        weight: [N, K] float8_e4m3fn.
        scale: [N, 1] float32; or [N / 128, K / 128], of blocks.
        bias: [N] or None.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None = None

    @classmethod
    def of(cls, matrix: Blocks) -> Fp8:
        """Take one scale of each block."""
        scale = matrix.scale if matrix.scale.shape[1] == 1 else matrix.scale[::128].contiguous()
        return cls(matrix.weight, scale, matrix.bias)


@attrs.frozen(eq=False)
class Stacked:
    """Matrices of the same inputs, one's outputs after the other's, where they are too different to be fused."""

    parts: tuple[SingleMatrix, ...]


SingleMatrix = Dense | Int8 | Blocks | Panels | Tiles | Fp8
Matrix = SingleMatrix | Stacked


@attrs.frozen(eq=False)
class Experts:
    """The feed-forward experts of one layer.

    Attributes:
        gate_up: [E, 2I, H], gate first.
        down: [E, H, I], of gate_up's kind.
        load: [E] int64, tokens each expert has received so far.
    """

    gate_up: SingleMatrix
    down: SingleMatrix
    load: Tensor


# Whether kernels multiply by a matrix as it is stored, given the type of activations and whether it is an expert's.
Keeps = Callable[[Blocks, torch.dtype, bool], bool]


def keeps_integers(matrix: Blocks, *_: object) -> bool:
    """Return whether numbers are integers: what native CPU kernels keep."""
    return not matrix.is_fp8
