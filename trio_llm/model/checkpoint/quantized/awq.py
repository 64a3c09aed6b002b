"""AWQ ("gemm"): 4-bit integers packed along the outputs in an interleaved order, a scale and a zero point per group.

Letters: N outputs, K inputs, G groups.
Source: Lin et al. 2023 (arXiv:2306.00978); the layout is AutoAWQ's.
"""

from __future__ import annotations

from collections.abc import Mapping

import attrs
import torch
from torch import Tensor

from trio_llm.errors import UnsupportedError
from trio_llm.model.checkpoint.quantized.blocks import block_shape
from trio_llm.model.checkpoint.quantized.packing import Grouped, grouped_scheme
from trio_llm.model.checkpoint.quantized.parts import WORDS, Parts, Scheme
from trio_llm.model.checkpoint.tensors import FLOATS
from trio_llm.model.config import ModelConfig

_PER_WORD = 8
# Output j of eight is the 4 bits at this place of a word.
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


@attrs.frozen
class Awq:
    """Parts: qweight [K, N / 8], qzeros [G, N / 8], scales [G, N]."""

    primary = "qweight"
    others = ("qzeros", "scales")

    @classmethod
    def of(cls, config: ModelConfig) -> Awq:
        """Read quantization_config."""
        bits = config.get_int("bits" if config.has("bits") else "w_bit")
        key = next(filter(config.has, ("version", "format", "checkpoint_format")), "version")
        version = config.get_str(key, "gemm").lower()
        if bits != 4 or version != "gemm":
            found = f"AWQ of {bits} bits, {key} = {version!r}"
            raise UnsupportedError(f"{config.source}: {found} is not supported; 4 bits, 'gemm' are")
        return cls()

    def scheme(self, parts: Parts) -> Scheme:
        inputs, words = parts.matrix("qweight", WORDS)
        outputs = words * _PER_WORD
        groups, _ = parts.matrix("scales", FLOATS)
        parts.check("scales", FLOATS, (groups, outputs))
        parts.check("qzeros", WORDS, (groups, words))
        if inputs % groups:
            raise parts.error("scales", f"has {groups} groups, which do not divide {inputs} inputs")
        shape = (outputs, inputs)
        blocks = block_shape(parts, shape, 4, groups, scale="scales", has_zeros=True)
        return grouped_scheme("AWQ 4-bit", shape, _grouped, blocks)


def _grouped(parts: Mapping[str, Tensor]) -> Grouped:
    return Grouped(4, _unpack(parts["qweight"]), parts["scales"].T, _unpack(parts["qzeros"]))


def _unpack(words: Tensor) -> Tensor:
    """Return uint8 [C * 8, R] of words [R, C]."""
    words = words.T.contiguous()
    values = torch.empty(len(words), _PER_WORD, words.shape[1], dtype=torch.uint8)
    for output, place in enumerate(_PLACES):
        values[:, output] = (words >> 4 * place) & 0xF
    return values.flatten(0, 1)
