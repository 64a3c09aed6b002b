"""Masks of tokens that a row may choose, on a CPU."""

from __future__ import annotations

from torch import Tensor

from cpu_kernels.library import kernels


def mask(logits: Tensor, masks: Tensor, rows: Tensor) -> None:
    """Set what a mask forbids to -infinity, in place.

    Args:
        logits: [R, V] float32, dense.
        masks: [n, ceil(V / 32)] int32, a bit per token that may be chosen, little-endian.
        rows: [n] int64, whose masks these are; none comes twice.
    """
    kernels()["mask"](logits, masks.contiguous(), rows, len(rows), logits.shape[1], masks.shape[1])
