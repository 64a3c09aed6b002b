"""Choose tokens on a GPU: edited logits, greedy or at random, by min_p, top_k and top_p without a sort."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cuda_kernels.gemm import choose_splits, split
from cuda_kernels.launch import Kernel, kernel
from cuda_kernels.paged_attn import device_of
from cuda_kernels.tickets import take_tickets
from cuda_kernels.tuning import tuning

THREADS = 512
LOGPROB_LOGITS = 16384  # of a block of token_logprobs
HISTOGRAM_WORDS = 2048 * 5 // 2  # of 8 bytes, as in sample_histogram.cuh
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


def share_row(logits: Tensor, wanted: int) -> tuple[int, int]:
    """Return how many tokens of a row each block takes, and how many blocks there are: at most `wanted`."""
    least = tuning(logits.device).block_logits
    steps, blocks = split(-(-logits.shape[1] // least), wanted)
    return steps * least, blocks


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
    words = edits.masks.shape[1] if edits else 0
    span, blocks = share_row(logits, choose_splits(rows, device_of(logits.device)))
    ids = logits.new_empty(rows, dtype=torch.int64)
    parts = tickets = histograms = None
    if blocks > 1:
        parts, tickets = ids.new_empty(rows, blocks, 2), take_tickets(logits.device, rows)
        histograms = None if params is None else ids.new_empty(rows, HISTOGRAM_WORDS)
    grid, block = (rows, blocks, 1), (THREADS, 1, 1)
    _kernel("likeliest")(
        grid, block, THREADS // 4, logits, *(edits or (None,) * 7), parts, histograms, tickets, ids, vocab, words, span
    )
    if params is not None:
        starts, masks = (edits.starts, edits.masks) if edits else (None, None)
        _kernel("draw")(
            grid, block, HISTOGRAM_WORDS * 8 + THREADS // 2 + 8,
            logits, params, keys, hashes, starts, masks, histograms, tickets, ids, vocab, words, span,
        )  # fmt: skip
    return ids


def token_logprobs(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-probability [R] of tokens ids [R] and their rank [R] int64, 1 for the most likely."""
    rows, vocab = logits.shape
    # As many blocks whatever the rows: how sums of floats are rounded must not depend on batch mates.
    span, blocks = share_row(logits, max(1, vocab // LOGPROB_LOGITS))
    logprobs, ranks = logits.new_empty(rows), logits.new_empty(rows, dtype=torch.int64)
    parts = tickets = None
    if blocks > 1:
        parts, tickets = logits.new_empty(rows, blocks, 4), take_tickets(logits.device, rows)
    args = (logits, ids, parts, tickets, logprobs, ranks, vocab, span)
    _kernel("token_logprobs")((rows, blocks, 1), (THREADS, 1, 1), THREADS // 4, *args)
    return logprobs, ranks


def _kernel(entry: str) -> Kernel:
    """Return an entry point; a block's scratch is 8 bytes a warp, or twice that beside a histogram."""
    return kernel("sample.cu", entry, THREADS=THREADS)
