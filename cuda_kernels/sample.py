"""Choose tokens on a GPU: edited logits, greedy or at random, by min_p, top_k and top_p without a sort."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cuda_kernels.launch import Kernel, kernel

THREADS = 512
NOT_FINITE, NOTHING_LEFT = -1, -2  # in place of a token id


def supports(logits: Tensor) -> str | None:
    """Say why logits [R, V] cannot be taken; None where they can."""
    if logits.dtype != torch.float32:
        return f"dtype {logits.dtype}"
    if logits.shape[1] >= 1 << 24:
        return f"a vocabulary of {logits.shape[1]}"
    return None


class Edits(NamedTuple):
    """What is done to logits [R, V] before a token is chosen, in this order; entries are row * V + token.

    Attributes:
        starts: [4, R + 1] int32, where each row's part begins in masked, biased, seen and masks.
        masked: [K] int64, never chosen.
        biased, bias: [K] int64, and float32 to add there; no entry twice.
        seen, penalties: [K] int64, no entry twice, and [4, K] float32: count in the output, repetition, presence and
            frequency penalty.
        masks: [n, V / 32 rounded up] int32, a bit per token that may be chosen.
    """

    starts: Tensor
    masked: Tensor
    biased: Tensor
    bias: Tensor
    seen: Tensor
    penalties: Tensor
    masks: Tensor


def sample(
    logits: Tensor, params: Tensor | None, keys: Tensor | None, hashes: Tensor, edits: Edits | None = None
) -> Tensor:
    """Choose one token per row.

    Args:
        logits: [R, V] float32, contiguous; edited in place.
        params: [R, 4] float32: temperature (0 is greedy), top_k (V for all), top_p (inf for all), min_p; None where
            every row is greedy.
        keys: [R, 2] int32, the rows' dice; with `params`.
        hashes: [V] int32, the tokens'.
    Returns:
        ids [R] int64: NOT_FINITE where a row of logits was not, NOTHING_LEFT where its edits left no token.
    """
    rows, vocab = logits.shape
    ids = logits.new_empty(rows, dtype=torch.int64)
    own, words = edits or (None,) * 7, edits.masks.shape[1] if edits else 0
    _kernel("sample")(
        (rows, 1, 1), (THREADS, 1, 1), THREADS // 4, logits, params, keys, hashes, *own, ids, vocab, words
    )
    return ids


def token_logprobs(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-probability [R] of tokens ids [R] and their rank [R] int64, 1 for the most likely."""
    rows, vocab = logits.shape
    logprobs, ranks = logits.new_empty(rows), logits.new_empty(rows, dtype=torch.int64)
    args = (logits, ids, logprobs, ranks, vocab)
    _kernel("token_logprobs")((rows, 1, 1), (THREADS, 1, 1), THREADS // 4, *args)
    return logprobs, ranks


def _kernel(entry: str) -> Kernel:
    """Return an entry point; a block's scratch is 8 bytes a warp."""
    return kernel("sample.cu", entry, THREADS=THREADS)
