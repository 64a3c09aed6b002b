"""Draws by the Gumbel-max trick on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from cpu_kernels.library import empty, kernels


def supports(logits: Tensor) -> str | None:
    """Return why logits [R, V] cannot be taken; None if they can."""
    return None if logits.dtype == torch.float32 and logits.is_contiguous() else "logits that are not dense float32"


def draw(logits: Tensor, params: Tensor, keys: Tensor, hashes: Tensor) -> Tensor:
    """Return the ids [R] int64 of the tokens that are drawn, by their filters; -1 where rounding could decide.

    Args:
        logits: [R, V] float32.
        params: [R, 4] float32: temperature, top_k (V for all), top_p (inf for all), min_p.
        keys, hashes: [R, 2] and [V] int32, from which the noise is computed.
    """
    rows, vocab_size = logits.shape
    ids, least = empty((rows,), torch.int64), params[:, 3].log()
    kernels()["draw"](logits, params.contiguous(), least, keys.contiguous(), hashes, ids, rows, vocab_size)
    return ids
