"""The largest logit of each row, on a CPU: for most steps all there is to sampling."""

from __future__ import annotations

import torch
from torch import Tensor

from cpu_kernels.library import empty, kernels


def argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return ids [R] int64 and values [R] of the largest of logits [R, V] float32, dense; of equal ones the lowest id.

    The id is -1 where that logit is infinite or any is NaN. The value is NaN where any is.
    """
    rows, vocab_size = logits.shape
    ids, tops = empty((rows,), torch.int64), empty((rows,), torch.float32)
    kernels()["argmax"](logits, ids, tops, rows, vocab_size)
    return ids, tops
