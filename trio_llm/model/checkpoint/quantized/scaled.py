"""Weights stored as INT8 or FP8 elements times a scale: per tensor, output, group or block.

It is the layout of compressed-tensors' int-quantized and float-quantized formats and of FP8 checkpoints. How the
activations would have been quantised does not matter here: they stay in the model's type.

Letters: N outputs, K inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import attrs
import torch
from torch import Tensor

from trio_llm.errors import CheckpointError
from trio_llm.model.checkpoint.quantized.blocks import block_shape, scales_of_blocks
from trio_llm.model.checkpoint.quantized.parts import SCALES, Parts, Scheme
from trio_llm.model.config import MAX_INT, ModelConfig
from trio_llm.model.ops.seam import Blocks

# What activations would have been quantised by.
ACTIVATION_SCALES = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")
_STORED = {"I8": "INT8", "F8_E4M3": "FP8", "F8_E5M2": "FP8 (e5m2)"}
_BLOCK = 128  # outputs and inputs that share a scale of torch's scaled product
_ZEROS = ("I8", "I32", *SCALES)


@attrs.frozen
class Scaled:
    """Parts: weight [N, K], a scale of 1, [N], [N, 1], [N, groups] or one per block, perhaps as many zero points.

    Attributes:
        block: Outputs and inputs of the blocks that share a scale; None if none do.
        has_zeros: Whether each matrix must have a zero point.
    """

    primary = "weight"
    others = ("weight_scale", "weight_scale_inv", "weight_zero_point", *ACTIVATION_SCALES)

    block: tuple[int, int] | None = None
    has_zeros: bool = False

    def scheme(self, parts: Parts) -> Scheme:
        shape = parts.matrix("weight", tuple(_STORED))
        name = "weight_scale_inv" if "weight_scale_inv" in parts else "weight_scale"
        repeats = self._repeats(parts, name, shape)
        if self.has_zeros or "weight_zero_point" in parts:
            parts.check("weight_zero_point", _ZEROS, parts.infos[name].shape)

        def widen(tensors: Mapping[str, Tensor]) -> Tensor:
            weight = tensors["weight"].float()
            if (zeros := tensors.get("weight_zero_point")) is not None:
                weight -= _spread(zeros, repeats, shape)
            return weight.mul_(_spread(tensors[name], repeats, shape))

        def keep(tensors: Mapping[str, Tensor]) -> Blocks:
            zeros, scales = tensors.get("weight_zero_point"), _grid_of(tensors[name])
            if self._is_fp8(parts):
                scales = scales.float()
            if repeats[0] not in (1, shape[0]):
                scales = scales.repeat_interleave(repeats[0], 0)
            scales = scales_of_blocks(scales, shape[0])
            zero = None if zeros is None else _grid_of(zeros).expand_as(scales).contiguous()
            return Blocks(tensors["weight"], scales, zero=zero)

        return Scheme(_STORED[parts.dtype("weight")], shape, widen, keep, self._template(parts, name, shape, repeats))

    def _template(
        self, parts: Parts, scale: str, shape: tuple[int, int], repeats: tuple[int, int]
    ) -> Callable[[], Blocks] | None:
        has_zeros = "weight_zero_point" in parts
        if self._is_fp8(parts):
            return None if has_zeros else _fp8_template(shape, repeats)
        if parts.dtype("weight") != "I8" or (has_zeros and parts.dtype("weight_zero_point") != "I8"):
            return None
        if repeats[0] not in (1, shape[0]) or shape[1] % repeats[1]:  # scales of several outputs, or of a cut group
            return None
        blocks = block_shape(parts, shape, 8, shape[1] // repeats[1], scale=scale, has_zeros=has_zeros)
        return blocks and blocks.template

    def _is_fp8(self, parts: Parts) -> bool:
        return parts.dtype("weight") == "F8_E4M3"

    def _repeats(self, parts: Parts, name: str, shape: tuple[int, int]) -> tuple[int, int]:
        """Return the number of outputs and of inputs that share a scale."""
        outputs, inputs = shape
        stored = parts.stored(name, SCALES).shape
        rows, columns = _grid(stored)
        if self.block and (rows, columns) == tuple(map(math.ceil, (outputs / self.block[0], inputs / self.block[1]))):
            return self.block
        if (rows, columns) == (1, 1):
            return shape
        if rows == outputs and columns > 0 and inputs % columns == 0:
            return 1, inputs // columns
        block = f" or block of {self.block[0]} x {self.block[1]}" if self.block else ""
        expected = f"one per tensor, output, group of inputs{block}"
        raise parts.error(name, f"has the shape {list(stored)} for {outputs} x {inputs} weights; expected {expected}")


def _fp8_template(shape: tuple[int, int], repeats: tuple[int, int]) -> Callable[[], Blocks] | None:
    """Return FP8 blocks without their values; None if torch's scaled product has no such scales."""
    outputs, inputs = shape
    is_cut = outputs % _BLOCK or inputs % _BLOCK
    if repeats[1] != inputs and (repeats != (_BLOCK, _BLOCK) or is_cut):
        return None
    if repeats[0] not in (1, outputs, _BLOCK):
        return None
    groups = inputs // repeats[1]
    return lambda: Blocks(
        torch.empty(shape, dtype=torch.float8_e4m3fn, device="meta"), torch.empty((outputs, groups), device="meta")
    )


def _grid_of(scale: Tensor) -> Tensor:
    return scale.reshape(_grid(tuple(scale.shape)))


def _grid(shape: tuple[int, ...]) -> tuple[int, int]:
    return (shape[0] if shape else 1, math.prod(shape[1:]))


def _spread(scale: Tensor, repeats: tuple[int, int], shape: tuple[int, ...]) -> Tensor:
    """Return one float32 scale per element of [N, K], or what broadcasts to that."""
    grid = _grid_of(scale.float())
    for dim in (0, 1):
        if grid.shape[dim] not in (1, shape[dim]):
            grid = grid.repeat_interleave(repeats[dim], dim).narrow(dim, 0, shape[dim])
    return grid


def read_block(config: ModelConfig, key: str) -> tuple[int, int] | None:
    """Return the sides of a block, [128, 128] or "128x128", or None if there is no such key."""
    if not config.has(key):
        return None
    value = config.values[key]
    sides = value.split("x") if isinstance(value, str) else value
    try:
        rows, columns = map(int, sides)
    except (TypeError, ValueError):
        rows = columns = 0
    if not (0 < rows <= MAX_INT and 0 < columns <= MAX_INT):
        raise CheckpointError(f"{config.source}: {key} = {value!r}: expected two positive integers")
    return rows, columns
