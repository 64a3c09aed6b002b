"""FP8 weights by torch's scaled product, which rounds activations to FP8 with a scale per token.

It has scales per row from compute capability 8.9 on; scales of 128 x 128 weights and 128 activations only on some
devices and with some versions of CUDA. What it has is found by trying.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from trio_llm.model.ops.matrices import Blocks, Fp8

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max  # 448
LEAST_CAPABILITY = (8, 9)
MULTIPLE = 16  # of inputs and outputs
BLOCK = 128
# Versions of torch differ in how they want rows of block scales to be aligned; for these multiples they agree.
BLOCK_MULTIPLE = 4 * BLOCK

_log = logging.getLogger(__name__)


def keeps(matrix: Blocks) -> bool:
    """Return whether the scaled product of this process's device takes a matrix."""
    outputs, inputs = matrix.weight.shape
    has_blocks = matrix.scale.shape[1] > 1
    if outputs % MULTIPLE or inputs % (BLOCK_MULTIPLE if has_blocks else MULTIPLE):
        return False
    return can_multiply(has_blocks=has_blocks)


@functools.cache
def can_multiply(*, has_blocks: bool) -> bool:
    """Try a small product on the current GPU."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < LEAST_CAPABILITY:
        return False
    weight = torch.ones(BLOCK_MULTIPLE, BLOCK_MULTIPLE, device="cuda")
    scale = weight[:4, :4] if has_blocks else weight[:, :1]
    try:
        out = linear(weight[:3].bfloat16(), Fp8(weight.to(FP8), scale.contiguous()))
        return bool((out == BLOCK_MULTIPLE).all())
    except (RuntimeError, ValueError) as error:
        _log.info("torch's scaled product has no scales %s here: %s", "of blocks" if has_blocks else "of rows", error)
        return False


def linear(x: Tensor, matrix: Fp8) -> Tensor:
    """Return x [S, K] times the matrix's transpose, [S, N], plus its bias."""
    has_blocks = matrix.scale.shape[1] > 1
    rounded, scale = quantize_rows(x, BLOCK if has_blocks else x.shape[1])
    # One scale per 128 activations lies with the tokens' next to each other, those of weights with the inputs'.
    own = scale.T.contiguous().T if has_blocks else scale
    product = torch._scaled_mm  # pyright: ignore[reportPrivateImportUsage] - in torch.nn.functional from 2.10 on only
    out = product(rounded, matrix.weight.T, own, matrix.scale.T, out_dtype=torch.bfloat16)
    out = out.to(x.dtype)
    return out if matrix.bias is None else out.add_(matrix.bias)


def quantize_rows(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Return x [S, K] in FP8, and the float32 scale of each group of inputs [S, K / group]: its largest becomes 448."""
    groups = x.float().unflatten(1, (-1, group))
    scale = (groups.abs().amax(-1, keepdim=True) / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    return (groups / scale).clamp_(-LARGEST, LARGEST).to(FP8).flatten(1), scale[..., 0]
