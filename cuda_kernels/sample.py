"""Choose tokens on a GPU: greedy or at random, by min_p, top_k, top_p and a mask of allowed tokens, without a sort."""

from __future__ import annotations

import torch
from torch import Tensor

from cuda_kernels.launch import Kernel, kernel

THREADS = 1024


def supports(logits: Tensor) -> str | None:
    """Say why logits [R, V] cannot be taken; None where they can."""
    if logits.dtype != torch.float32:
        return f"dtype {logits.dtype}"
    if logits.shape[1] >= 1 << 24:
        return f"a vocabulary of {logits.shape[1]}"
    return None


def sample(
    logits: Tensor, params: Tensor | None, keys: Tensor | None, hashes: Tensor, allowed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Choose one token per row.

    Args:
        logits: [R, V] float32, contiguous.
        params: [R, 4] float32: temperature (0 is greedy), top_k (V for all), top_p (inf for all), min_p; None where
            every row is greedy.
        keys: [R, 2] int32, the rows' dice; with `params`.
        hashes: [V] int32, the tokens'.
        allowed: [R, V / 32 rounded up] int32, a bit per token; None for all.
    Returns:
        ids [R] int64, and the largest allowed logit of each row [R]: not finite where the row failed.
    """
    rows, vocab = logits.shape
    ids, tops = logits.new_empty(rows, dtype=torch.int64), logits.new_empty(rows)
    words = 0 if allowed is None else allowed.shape[1]
    args = (logits, params, keys, hashes, allowed, ids, tops, vocab, words)
    _kernel("sample")((rows, 1, 1), (THREADS, 1, 1), THREADS // 4, *args)
    return ids, tops


def token_logprobs(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-probability [R] of tokens ids [R] and their rank [R] int64, 1 for the likeliest."""
    rows, vocab = logits.shape
    logprobs, ranks = logits.new_empty(rows), logits.new_empty(rows, dtype=torch.int64)
    args = (logits, ids, logprobs, ranks, vocab)
    _kernel("token_logprobs")((rows, 1, 1), (THREADS, 1, 1), THREADS // 4, *args)
    return logprobs, ranks


def verify_drafts(sampled: Tensor, drafts: Tensor, cu: Tensor) -> Tensor:
    """Return [B] int32, how many drafts of each sequence were sampled before the first that was not.

    Args:
        sampled: [S] int64, the token sampled after each of a sequence's drafts.
        drafts: [S] int64, laid out alike; -1 at each sequence's last place.
        cu: [B + 1] int32, where each sequence begins.
    """
    sequences = len(cu) - 1
    accepted = cu.new_empty(sequences)
    _kernel("verify_drafts")((-(-sequences // 128), 1, 1), (128, 1, 1), 0, sampled, drafts, cu, accepted, sequences)
    return accepted


def _kernel(entry: str) -> Kernel:
    """Return an entry point; a block's scratch is 8 bytes a warp."""
    return kernel("sample.cu", entry, THREADS=THREADS)
