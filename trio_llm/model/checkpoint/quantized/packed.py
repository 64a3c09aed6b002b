"""compressed-tensors' pack-quantized format: signed integers, packed with an offset of half their range.

Letters: N outputs, K inputs, G groups, P integers in a word.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import attrs
import torch
from torch import Tensor

from trio_llm.model.checkpoint.quantized.blocks import block_shape
from trio_llm.model.checkpoint.quantized.packing import Grouped, grouped_scheme, unpack
from trio_llm.model.checkpoint.quantized.parts import INDEXES, WORDS, Parts, Scheme
from trio_llm.model.checkpoint.quantized.scaled import ACTIVATION_SCALES
from trio_llm.model.checkpoint.tensors import FLOATS


@attrs.frozen
class Packed:
    """Parts: weight_packed [N, K / P], weight_scale of 1 or [N, G], and weight_shape, which is N and K.

    With zero points, weight_zero_point [N / P, G], or int8 of the scale's shape. With activation order,
    weight_g_idx [K], the group of each input.

    Attributes:
        bits: Those that the configuration names; a layer's own are read from its shape.
        has_zeros: Whether each matrix must have a zero point.
    """

    primary = "weight_packed"
    others = ("weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx", *ACTIVATION_SCALES)

    bits: tuple[int, ...]
    has_zeros: bool

    def scheme(self, parts: Parts) -> Scheme:
        outputs, words = parts.matrix("weight_packed", WORDS)
        parts.check("weight_shape", INDEXES, (2,))
        stored = parts.values("weight_shape").tolist()
        fitting = [bits for bits in self.bits if math.ceil(stored[1] * bits / 32) == words]
        if stored[0] != outputs or len(fitting) != 1:
            bits = " or ".join(map(str, self.bits))
            raise parts.error("weight_shape", f"is {stored}; {outputs} x {words} words hold others in {bits} bits")
        inputs, bits = stored[1], fitting[0]
        groups = self._check_scales(parts, outputs, bits)
        order = None
        if "weight_g_idx" in parts:
            parts.check("weight_g_idx", INDEXES, (inputs,))
            order = _groups(parts.values("weight_g_idx"))
        elif inputs % groups:
            raise parts.error("weight_scale", f"has {groups} groups, which do not divide {inputs} inputs")

        def grouped(tensors: Mapping[str, Tensor]) -> Grouped:
            return _grouped(tensors, bits, inputs)

        shape, has_zeros = (outputs, inputs), "weight_zero_point" in parts
        blocks = block_shape(parts, shape, bits, groups, scale="weight_scale", has_zeros=has_zeros, groups=order)
        if has_zeros and bits < 8 and parts.dtype("weight_zero_point") == "I8":
            blocks = None  # zero points of more bits than the numbers have
        return grouped_scheme(f"compressed-tensors {bits}-bit", shape, grouped, blocks)

    def _check_scales(self, parts: Parts, outputs: int, bits: int) -> int:
        """Return the number of groups."""
        if "weight_scale" in parts and len(parts.infos["weight_scale"].shape) == 1:
            scale, groups = parts.check("weight_scale", FLOATS, (1,)), 1
        else:
            groups = parts.matrix("weight_scale", FLOATS)[1]
            scale = parts.check("weight_scale", FLOATS, (outputs, groups))
        if "weight_zero_point" in parts and parts.dtype("weight_zero_point") == "I8":
            parts.check("weight_zero_point", ("I8",), scale)
        elif self.has_zeros or "weight_zero_point" in parts:
            parts.check("weight_zero_point", WORDS, (math.ceil(outputs * bits / 32), groups))
        return groups


def _grouped(parts: Mapping[str, Tensor], bits: int, inputs: int) -> Grouped:
    values = unpack(parts["weight_packed"], bits)[:, :inputs]
    scales = parts["weight_scale"].reshape(-1, parts["weight_scale"].shape[-1])
    zeros = parts.get("weight_zero_point")
    if zeros is not None and zeros.dtype == torch.int8:
        zeros = zeros.reshape(scales.shape).short() + (1 << (bits - 1))
    elif zeros is not None:
        zeros = unpack(zeros.T, bits).T[: len(values)]
    return Grouped(bits, values, scales, zeros, _groups(parts.get("weight_g_idx")))


def _groups(stored: Tensor | None) -> Tensor | None:
    """Return each input's group [K]; None without activation order, which older files write as -1."""
    return None if stored is None or bool((stored == -1).all()) else stored
