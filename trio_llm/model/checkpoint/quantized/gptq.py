"""GPTQ: integers of 2, 4 or 8 bits packed along the inputs, a scale and a zero point per group and output.

Letters: N outputs, K inputs, G groups, P integers in a word.
Source: Frantar et al. 2022 (arXiv:2210.17323); the layout is AutoGPTQ's and GPTQModel's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import attrs
import torch
from torch import Tensor

from trio_llm.errors import UnsupportedError
from trio_llm.model.checkpoint.quantized.blocks import block_shape
from trio_llm.model.checkpoint.quantized.packing import Grouped, grouped_scheme, unpack
from trio_llm.model.checkpoint.quantized.parts import INDEXES, WORDS, Parts, Scheme
from trio_llm.model.checkpoint.tensors import FLOATS
from trio_llm.model.config import ModelConfig

_BITS = (2, 4, 8)


@attrs.frozen
class Gptq:
    """Parts: qweight [K / P, N], qzeros [G, N / P], scales [G, N] and g_idx [K], the group of each input.

    A layer's bits are read from its shapes: a checkpoint may have layers of different ones.

    Attributes:
        group_size: Inputs of a group where there is no g_idx; None for all.
        zero_offset: Added to a stored zero point: 1 in the first version of the format, 0 in the second.
    """

    primary = "qweight"
    others = ("qzeros", "scales", "g_idx")

    group_size: int | None
    zero_offset: int

    @classmethod
    def of(cls, config: ModelConfig) -> Gptq:
        """Read quantization_config."""
        bits = config.get_int("bits")
        if bits not in _BITS:
            raise UnsupportedError(f"{config.source}: GPTQ of {bits} bits is not supported; 2, 4, 8 are")
        key = "checkpoint_format" if config.has("checkpoint_format") else "format"
        zero_offset = config.choice(key, {"gptq": 1, "gptq_v2": 0}, "gptq")
        group_size = config.get_int("group_size", -1, minimum=-1)
        return cls(group_size if group_size > 0 else None, zero_offset)

    def scheme(self, parts: Parts) -> Scheme:
        words, outputs = parts.matrix("qweight", WORDS)
        groups, _ = parts.matrix("scales", FLOATS)
        parts.check("scales", FLOATS, (groups, outputs))
        _, zero_words = parts.matrix("qzeros", WORDS)
        parts.check("qzeros", WORDS, (groups, zero_words))
        bits, rest = divmod(32 * zero_words, outputs)
        if bits not in _BITS or rest:
            raise parts.error(
                "qzeros", f"has {zero_words} words for {outputs} zero points; 2, 4 or 8 bits are supported"
            )
        inputs = words * 32 // bits
        if "g_idx" in parts:
            parts.check("g_idx", INDEXES, (inputs,))
        elif math.ceil(inputs / (self.group_size or inputs)) != groups:
            raise parts.error(
                "scales", f"has {groups} groups; {inputs} inputs do not make them, {self.group_size} each"
            )

        def grouped(tensors: Mapping[str, Tensor]) -> Grouped:
            return self._grouped(tensors, bits)

        shape = (outputs, inputs)
        of_inputs = self._groups(parts.values("g_idx") if "g_idx" in parts else None, inputs)
        blocks = block_shape(parts, shape, bits, groups, scale="scales", has_zeros=True, groups=of_inputs)
        return grouped_scheme(f"GPTQ {bits}-bit", shape, grouped, blocks)

    def _grouped(self, parts: Mapping[str, Tensor], bits: int) -> Grouped:
        values = unpack(parts["qweight"].T, bits)
        # The first version stores a zero point of 0 as the largest one.
        zeros = (unpack(parts["qzeros"], bits) + self.zero_offset) & ((1 << bits) - 1)
        groups = self._groups(parts.get("g_idx"), values.shape[1])
        return Grouped(bits, values, parts["scales"].T, zeros.T, groups)

    def _groups(self, stored: Tensor | None, inputs: int) -> Tensor:
        """Return each input's group [K]."""
        return torch.arange(inputs) // (self.group_size or inputs) if stored is None else stored
