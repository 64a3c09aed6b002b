"""GGUF's quantised blocks as the matrices that kernels multiply by, every weight exactly as stored.

Formats of 4 bits keep their bytes. Those of 2 and 3 bits are stored in 4, those of 5 and 6 bits, and those that choose
from a list of values, in 8.

Letters: N outputs, K inputs, B blocks of an output's inputs. `raw` is uint8 [N, B, bytes of a block]; it may be on the
meta device.
Source: the layouts are ggml's, as in its Python package gguf.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from trio_llm.model.ops.seam import Blocks

_IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_MXFP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # twice the value


def _halves(raw: Tensor, begin: int, count: int = 1) -> Tensor:
    """Return `count` float16 numbers of each block [N, B, count]."""
    return raw[..., begin : begin + 2 * count].contiguous().view(torch.float16)


def _outer(raw: Tensor, begin: int) -> Tensor:
    """Return the outer scales of scales and of minima [N, B, 2]. GGUF subtracts minima."""
    return _halves(raw, begin, 2) * torch.tensor([1, -1], dtype=torch.float16, device=raw.device)


def _bytes(raw: Tensor, begin: int, end: int | None = None) -> Tensor:
    return raw[..., begin:end].contiguous()


def _nibbles(packed: Tensor) -> Tensor:
    """Return [..., 2, W] from bytes [..., W]: all low halves, then all high ones."""
    low, high = packed & 0xF, packed >> 4
    return torch.stack((low, high), dim=-2)


def _planes(packed: Tensor, bits: int) -> Tensor:
    """Return [..., 8 / bits, W] from bytes [..., W]: the lowest bits of all, then the next ones."""
    mask = (1 << bits) - 1
    return torch.stack([packed >> shift & mask for shift in range(0, 8, bits)], dim=-2)


def _signed(numbers: Tensor, less: int) -> Tensor:
    return (numbers.view(torch.int8) - less).contiguous()


def _q4_0(raw: Tensor) -> Blocks:
    return Blocks(_bytes(raw, 2).flatten(1), _halves(raw, 0)[..., 0])


def _q4_1(raw: Tensor) -> Blocks:
    scales = _halves(raw, 0, 2)
    return Blocks(_bytes(raw, 4).flatten(1), scales[..., 0].contiguous(), minimum=scales[..., 1].contiguous())


def _five_bits(high: Tensor, low: Tensor) -> Tensor:
    """Return numbers [N, K] of 5 bits, from the fifth bits [N, B, 4] and the others [N, B, 16]."""
    fifth = torch.stack([high >> bit & 1 for bit in range(8)], dim=-1).flatten(-2)
    return (_nibbles(low).flatten(-2) | fifth << 4).flatten(1)


def _q5_0(raw: Tensor) -> Blocks:
    return Blocks(_signed(_five_bits(raw[..., 2:6], raw[..., 6:]), 16), _halves(raw, 0)[..., 0])


def _q5_1(raw: Tensor) -> Blocks:
    scales = _halves(raw, 0, 2)
    numbers = _signed(_five_bits(raw[..., 4:8], raw[..., 8:]), 0)
    return Blocks(numbers, scales[..., 0].contiguous(), minimum=scales[..., 1].contiguous())


def _q8_0(raw: Tensor) -> Blocks:
    return Blocks(_bytes(raw, 2).view(torch.int8).flatten(1), _halves(raw, 0)[..., 0])


def _q2_k(raw: Tensor) -> Blocks:
    scales, numbers = _nibbles(raw[..., :16]), _planes(raw[..., 16:80].unflatten(-1, (2, 32)), 2)
    weight = Blocks.paired(numbers).flatten(1)
    scale, minimum = (scales[..., part, :].flatten(1).contiguous().view(torch.int8) for part in (0, 1))
    return Blocks(weight, scale, minimum=minimum, outer=_outer(raw, 80))


def _q3_k(raw: Tensor) -> Blocks:
    low = _planes(raw[..., 32:96].unflatten(-1, (2, 32)), 2).flatten(-3, -2)  # [N, B, 8, 32]
    numbers = low | _planes(raw[..., :32], 1) << 2  # less 4
    packed = raw[..., 96:108]
    upper = _planes(packed[..., 8:], 2).flatten(-2)
    scale = _signed((_nibbles(packed[..., :8]).flatten(-2) | upper << 4).flatten(1), 32)
    return Blocks(Blocks.paired(numbers + 4).flatten(1), scale, outer=_halves(raw, 108))


def _six_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scales and the minima [N, K / 32] of Q4_K and Q5_K, from [N, B, 12]."""
    first, second, third = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scale = torch.cat((first & 63, third & 0xF | first >> 6 << 4), dim=-1)
    minimum = torch.cat((second & 63, third >> 4 | second >> 6 << 4), dim=-1)
    return scale.flatten(1).view(torch.int8), minimum.flatten(1).view(torch.int8)


def _q4_k(raw: Tensor) -> Blocks:
    scale, minimum = _six_bits(raw[..., 4:16])
    numbers = _nibbles(raw[..., 16:].unflatten(-1, (4, 32)))
    return Blocks(Blocks.paired(numbers).flatten(1), scale, minimum=minimum, outer=_outer(raw, 0))


def _q5_k(raw: Tensor) -> Blocks:
    scale, minimum = _six_bits(raw[..., 4:16])
    numbers = _nibbles(raw[..., 48:].unflatten(-1, (4, 32))).flatten(-3, -2) | _planes(raw[..., 16:48], 1) << 4
    return Blocks(_signed(numbers.flatten(1), 0), scale, minimum=minimum, outer=_outer(raw, 0))


def _q6_k(raw: Tensor) -> Blocks:
    low = _nibbles(raw[..., :128].unflatten(-1, (2, 64)))  # [N, B, 2, 2, 64]: in this order 128 numbers of each half
    high = _planes(raw[..., 128:192].unflatten(-1, (2, 32)), 2)
    numbers = low.flatten(-2) | high.flatten(-2) << 4
    scale = _bytes(raw, 192, 208).view(torch.int8).flatten(1)
    return Blocks(_signed(numbers.flatten(1), 32), scale, outer=_halves(raw, 208))


def _listed(packed: Tensor, values: tuple[int, ...]) -> Tensor:
    """Return int8 [N, K] from their places in a list, [N, B, 16]."""
    places = _nibbles(packed).flatten(1)
    if places.is_meta:
        return places.view(torch.int8)
    return torch.tensor(values, dtype=torch.int8)[places.int()]


def _iq4_nl(raw: Tensor) -> Blocks:
    return Blocks(_listed(raw[..., 2:], _IQ4_NL), _halves(raw, 0)[..., 0])


def _mxfp4(raw: Tensor) -> Blocks:
    # The exponent of half the scale: 2 ** (byte - 128).
    scale = torch.exp2(raw[..., 0].float() - 128)
    return Blocks(_listed(raw[..., 1:], _MXFP4), scale)


# Format -> what makes a matrix of raw blocks.
CONVERTERS: Mapping[str, Callable[[Tensor], Blocks]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0, "Q2_K": _q2_k, "Q3_K": _q3_k,
    "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k, "IQ4_NL": _iq4_nl, "MXFP4": _mxfp4,
}  # fmt: skip
