"""From logits to tokens: every row by its own parameters, all rows of a step at once, on the logits' device.

Order as in vLLM: log-probabilities of the raw logits -> allowed tokens, masks, bias, penalties (logit_edits) ->
greedy argmax | temperature -> min_p -> top_k -> top_p -> draw. A filter keeps everything at or above a threshold, so
tokens as likely as the last one kept are kept too, and no order among equals matters. A row's result is a function of
that row alone; batch mates only decide which rows are computed together.

Letters: R rows sampled in this step, V vocabulary, C candidates.
"""

from __future__ import annotations

from collections.abc import Callable

import attrs
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from trio_llm.messages import CONTRADICTED, CORRUPTED, TokenLogprobs
from trio_llm.model.ops.dispatch import choose
from trio_llm.model.ops.logit_edits import forbid
from trio_llm.model.sampling.counter_rng import add_gumbel, token_hashes
from trio_llm.model.sampling.logprobs import Scores, score_logits
from trio_llm.model.sampling.row_params import FILTERED, MIN_P, RANDOM, TEMPERATURE, TOP_K, TOP_P, SamplingBatch
from trio_llm.model.sampling.top_k import argmax, largest

# In place of a token id.
NOT_FINITE, NOTHING_LEFT = -1, -2
FAILURES = {
    NOT_FINITE: CORRUPTED,
    NOTHING_LEFT: CONTRADICTED,
}

# Likeliest tokens to try before a whole row is sorted: most requests cut within them (a guess). A constant, so that a
# row's code path does not depend on its batch mates.
_CANDIDATES = 128

# Entries drawn at a time on a CPU, so that the passes of a draw stay in the second-level cache.
_CPU_DRAW_ENTRIES = 2**17


@attrs.frozen(eq=False)
class Sampled:
    """What was sampled, where the logits are.

    Attributes:
        token_ids: [R] int64; NOT_FINITE or NOTHING_LEFT where the row failed.
        logprob_rows: Rows that asked for log-probabilities.
        num_logprobs: Per such row, how many of the likeliest tokens it gets.
        names: Per such row, further tokens that it asked for.
        scores: Of these rows; None if there are none.
    """

    token_ids: Tensor
    logprob_rows: tuple[int, ...] = ()
    num_logprobs: tuple[int, ...] = ()
    names: tuple[tuple[int, ...], ...] = ()
    scores: Scores | None = None

    def to_host(self, copy: Callable[[Tensor], Tensor]) -> Sampled:
        """Return the same with every tensor copied."""
        scores = None if self.scores is None else self.scores.to_host(copy)
        return Sampled(copy(self.token_ids), self.logprob_rows, self.num_logprobs, self.names, scores)

    def logprobs(self) -> list[TokenLogprobs | None] | None:
        """Return one entry per row, None where it did not ask or failed; None if no row asked."""
        if self.scores is None:
            return None
        token_ids = self.token_ids.tolist()
        entries = self.scores.describe([token_ids[row] for row in self.logprob_rows], self.num_logprobs, self.names)
        by_row = {row: entry for row, entry in zip(self.logprob_rows, entries, strict=True) if entry.token_id >= 0}
        return [by_row.get(row) for row in range(len(token_ids))]


class Sampler:
    """Chooses tokens. Holds no state of any sequence."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._hashes = token_hashes(vocab_size).to(device)

    def sample(self, logits: Tensor, batch: SamplingBatch, likeliest: NDArray[np.int64] | None = None) -> Sampled:
        """Sample one token per row; on a GPU by two kernels, and without waiting for it.

        The kernel chooses the reference's tokens unless rounding decides: two noisy scores, or a score and a cut, may
        differ by less than float32 resolves.

        Args:
            logits: [R, V] float32, contiguous; overwritten.
            batch: The same R rows, none of them padding.
            likeliest: [R], the argmax of the logits, NOT_FINITE where it is not finite; None if it is not known.
        """
        if likeliest is not None and not batch.union:
            return Sampled(torch.from_numpy(likeliest.copy()))
        rows = batch.device_logprob_rows
        raw = None if rows is None else logits.index_select(0, rows)  # as they are before the edits
        kernels = choose("sample", logits)
        if kernels:
            token_ids = kernels.sample(logits, batch.params, batch.keys, self._hashes, batch.edits)
        else:
            token_ids = self._token_ids(logits, batch)
        if rows is None or raw is None:
            return Sampled(token_ids)
        # The entries of failed rows are computed but never reported.
        chosen = token_ids.index_select(0, rows).clamp_min_(0)
        num_logprobs = batch.num_logprobs.tolist()
        scores = score_logits(raw, chosen, max(num_logprobs), batch.named)
        return Sampled(token_ids, tuple(batch.logprob_rows.tolist()), tuple(num_logprobs), batch.names, scores)

    def _token_ids(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        """Do it by torch: the reference of the kernel."""
        finite = None
        if batch.edits is not None:
            # Check before the edits: a mask could hide a NaN, and an infinity could become one.
            finite = logits.amax(-1).isfinite()
            kernels = choose("mask", logits) if len(batch.edits.bound) else None
            batch.edits.apply(logits, forbid if kernels is None else kernels.mask)
        ids, top = argmax(logits)
        if batch.union & RANDOM:
            self._draw(logits, batch, ids)
        return _mark_failures(ids, top, finite)

    def _draw(self, logits: Tensor, batch: SamplingBatch, ids: Tensor) -> None:
        """Overwrite the ids of the rows that are RANDOM."""
        assert batch.params is not None
        assert batch.keys is not None
        kernels = choose("draw", logits)
        rows = _index(np.flatnonzero(batch.flags & RANDOM), logits)
        if len(rows) == len(logits):
            some, params, keys = logits, batch.params, batch.keys
        else:
            some, params, keys = logits[rows], batch.params[rows], batch.keys[rows]
        if kernels is None:
            ids[rows] = self._draw_by_torch(some, params, keys, batch.flags[batch.flags & RANDOM > 0] & FILTERED > 0)
            return
        drawn = kernels.draw(some, params, keys, self._hashes)
        # A hair decides some draws. By the reference's own arithmetic, so the tokens are the reference's.
        close = (drawn < 0).nonzero()[:, 0]
        if len(close):
            drawn[close] = self._draw_whole(some[close], params[close], keys[close], cut=True)
        ids[rows] = drawn

    def _draw_by_torch(self, logits: Tensor, params: Tensor, keys: Tensor, filtered: NDArray[np.bool_]) -> Tensor:
        """Return [n] ids drawn from logits [n, V]; [n] says which rows are filtered."""
        drawn = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
        plain = _index(np.flatnonzero(~filtered), logits)
        if len(plain):
            drawn[plain] = self._draw_whole(logits[plain], params[plain], keys[plain], cut=False)
        some = _index(np.flatnonzero(filtered), logits)
        if len(some):
            drawn[some] = self._draw_candidates(logits[some], params[some], keys[some])
            rest = some[drawn[some] < 0]
            if len(rest):
                drawn[rest] = self._draw_whole(logits[rest], params[rest], keys[rest], cut=True)
        return drawn

    def _draw_candidates(self, logits: Tensor, params: Tensor, keys: Tensor) -> Tensor:
        """Return [n] ids drawn among the likeliest of logits [n, V]; -1 if the cut is, or may be, beyond them."""
        values, candidates = largest(logits, _CANDIDATES)
        top = values[:, :1]
        scores = (values - top) / params[:, TEMPERATURE, None]
        cutoff = _cutoff(scores, params)
        total = None
        # If neither min_p nor top_k cuts within the candidates, top_p applies to the mass of the whole vocabulary.
        beyond = ((scores[:, -1:] >= cutoff) & (params[:, TOP_P, None] < 1))[:, 0].nonzero()[:, 0]
        if len(beyond):
            mass = _mass(logits[beyond], top[beyond], params[beyond], cutoff[beyond])
            total = torch.zeros_like(top).index_copy_(0, beyond, mass)
        threshold = _threshold(scores, cutoff, params[:, TOP_P, None], total)
        noisy = add_gumbel(scores.masked_fill(scores < threshold, -torch.inf), keys, self._hashes[candidates])
        drawn = candidates.gather(1, noisy.argmax(-1, keepdim=True))[:, 0]
        top_k = params[:, TOP_K]
        decided = (top_k <= values.shape[1]) | (top_k >= logits.shape[1])
        return drawn.where(decided & (scores[:, -1] < threshold[:, 0]), -1)

    def _draw_whole(self, logits: Tensor, params: Tensor, keys: Tensor, *, cut: bool) -> Tensor:
        """Return [n] ids drawn from all of logits [n, V]; `cut` says whether to filter first."""
        at_once = max(1, _CPU_DRAW_ENTRIES // logits.shape[1]) if logits.is_cpu else len(logits)
        drawn: list[Tensor] = []
        for some, own, key in zip(logits.split(at_once), params.split(at_once), keys.split(at_once), strict=True):
            scores = (some - some.amax(-1, keepdim=True)).div_(own[:, TEMPERATURE, None])
            if cut:
                ordered = _descending(scores)
                threshold = _threshold(ordered, _cutoff(ordered, own), own[:, TOP_P, None], None)
                scores.masked_fill_(scores < threshold, -torch.inf)
            drawn.append(argmax(add_gumbel(scores, key, self._hashes))[0])
        return torch.cat(drawn)


def _index(indices: NDArray[np.intp], like: Tensor) -> Tensor:
    return torch.from_numpy(indices).to(like.device, non_blocking=True)


def _mark_failures(ids: Tensor, top: Tensor, finite: Tensor | None) -> Tensor:
    """Replace the ids of rows that have no largest logit.

    Args:
        top: [R], the largest logits after the edits.
        finite: [R], whether those before the edits were; None where there were no edits.
    """
    if finite is None:
        if top.is_cpu and np.isfinite(top.numpy()).all():  # as in most steps, without another operation of torch
            return ids
        return ids.where(top.isfinite(), NOT_FINITE)
    return ids.where(top > -torch.inf, NOTHING_LEFT).where(finite, NOT_FINITE)


def _cutoff(scores: Tensor, params: Tensor) -> Tensor:
    """Return [n, 1], the least score that min_p and top_k keep, for scores [n, C] in descending order from 0.

    A top_k above C cuts nothing here.
    """
    count = scores.shape[1]
    top_k = params[:, TOP_K, None].long()
    kth = scores.gather(1, top_k.clamp(max=count) - 1).where(top_k <= count, -torch.inf)
    # Never below the smallest float: masked tokens are at -inf and stay out.
    return torch.maximum(params[:, MIN_P, None].log(), kth).clamp_(min=torch.finfo(scores.dtype).min)


def _mass(logits: Tensor, top: Tensor, params: Tensor, cutoff: Tensor) -> Tensor:
    """Return [n, 1], the sum of exp(score) over all of logits [n, V] whose score is at or above the cutoff."""
    scores = (logits - top).div_(params[:, TEMPERATURE, None])
    # The largest score is 0, so the largest probability is one over the mass.
    return scores.masked_fill_(scores < cutoff, -torch.inf).softmax(-1).amax(-1, keepdim=True).reciprocal_()


def _threshold(scores: Tensor, cutoff: Tensor, top_p: Tensor, total: Tensor | None) -> Tensor:
    """Return [n, 1], the least score of the smallest set at or above the cutoff that holds top_p of the mass.

    Args:
        scores: [n, C], descending.
        total: [n, 1], the mass if it extends beyond the C scores, else 0; None if it never does.
    """
    kept = scores >= cutoff
    ahead = F.pad(scores.exp().mul_(kept).cumsum(-1), (1, 0))
    mass = ahead[:, -1:] if total is None else torch.where(total > 0, total, ahead[:, -1:])
    kept &= ahead[:, :-1] < top_p * mass
    return scores.where(kept, torch.inf).amin(-1, keepdim=True)


def _descending(scores: Tensor) -> Tensor:
    """Sort [n, V]. numpy's vectorised sort takes a fifteenth of torch's time on a CPU."""
    if scores.is_cpu:
        return torch.from_numpy(np.sort(scores.numpy(), axis=-1)).flip(-1)
    return scores.sort(dim=-1, descending=True).values
