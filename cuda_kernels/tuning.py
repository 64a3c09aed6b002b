"""Numbers that only a measurement can settle. No GPU has run these kernels: every one of them is a guess."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tuning:
    """One architecture's numbers.

    Attributes:
        waves: Blocks per multiprocessor below which the inputs of a product are split.
        least_split_keys: Keys below which a part costs more than it brings.
        gemm_rows: Most rows of an int8 product that leaves them as they are; beyond it they are rounded to int8, too.
        w4_rows: The same of 4-bit weights; more rows share what one reads.
        gemm_bytes: Stages in flight of an int8 product, which has few blocks.
        expert_bytes: The same of experts, where several blocks share a multiprocessor.
        expert_rows: Tokens an expert can expect, above which its tiles have 64 rows instead of 16.
        widened_elements: Weights widened for cuBLAS at a time.
        block_logits: Fewest logits of a row that are worth a block.
        prologue_bytes: Most of a batch that every block of a product normalises anew; beyond it a launch costs less.
        widest_head: Largest head size whose prefills have 32 rows a warp, of 16-bit keys: no guess, ptxas says so.
    """

    waves: int
    least_split_keys: int
    gemm_rows: int
    w4_rows: int
    gemm_bytes: int
    expert_bytes: int
    expert_rows: int
    widened_elements: int
    block_logits: int
    prologue_bytes: int
    widest_head: int


#                waves keys rows  w4  gemm_bytes  expert_bytes  expert_rows  widened     logits prologue  widest_head
BY_ARCHITECTURE = {
    (8, 0): Tuning(2, 256, 64, 256, 96 * 1024, 48 * 1024, 16, 64 * 2**20, 4096, 16 * 1024, 128),
    (8, 9): Tuning(2, 256, 64, 256, 96 * 1024, 48 * 1024, 16, 64 * 2**20, 4096, 16 * 1024, 128),
    (9, 0): Tuning(2, 256, 64, 256, 96 * 1024, 48 * 1024, 16, 64 * 2**20, 4096, 16 * 1024, 128),
    (10, 0): Tuning(2, 256, 64, 256, 96 * 1024, 48 * 1024, 16, 64 * 2**20, 4096, 16 * 1024, 64),
    (12, 0): Tuning(2, 256, 64, 256, 96 * 1024, 48 * 1024, 16, 64 * 2**20, 4096, 16 * 1024, 128),
}  # fmt: skip
_OLDEST, _SIMULATED = (8, 0), (9, 0)


@functools.cache
def tuning(device: torch.device) -> Tuning:
    """Return the numbers of a device: those of the newest architecture that is not newer than it."""
    found = torch.cuda.get_device_capability(device) if device.type == "cuda" else _SIMULATED
    return BY_ARCHITECTURE[max((known for known in BY_ARCHITECTURE if known <= found), default=_OLDEST)]
