"""Checks of the kernels that take logits: the largest, draws and log-probabilities, against float64."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cpu_kernels import argmax, logprobs, mask, sample
from trio_llm.model.sampling.counter_rng import row_keys, token_hashes, uniform

ALL = float("inf")
# top_k (0 for all), top_p, min_p
FILTERS = (
    (0, ALL, 0),
    (0, 0.9, 0),
    (20, ALL, 0),
    (20, 0.3, 0),
    (0, ALL, 0.1),
    (70, 0.95, 0.02),
    (0, 0.3, 0),
    (1, ALL, 0),
)
VOCABULARIES = (1, 7, 300, 151_937)


def drawn(logits: Tensor, params: Tensor, noise: Tensor) -> tuple[int, bool]:
    """Draw from one row [V] by sorting, with noise [V] float64; whether a hair decided."""
    _, top_k, top_p, min_p = params.tolist()
    scores = ((logits - logits.amax()) / params[0]).double()
    kept = (scores > -torch.inf) & (scores >= params[3].log()) if min_p else scores > -torch.inf
    if top_k < len(scores):
        kept &= scores >= scores.sort(descending=True).values[int(top_k) - 1]
    mass = scores.exp() * kept
    close = False
    while True:
        order = torch.where(kept, scores + noise, -torch.inf).topk(min(2, len(scores)))
        winner = int(order.indices[0])
        close |= len(order.values) == 2 and float(order.values[0] - order.values[1]) < 1.1e-3
        likelier = float(mass[scores > scores[winner]].sum() / mass.sum())
        close |= abs(likelier / top_p - 1) < 1.1e-5
        if likelier < top_p:
            return winner, close
        kept = kept & (scores > scores[winner])


def check_draw() -> None:
    """Draw the token that sorting in float64 draws, for every filter; -1 only where a hair decides."""
    for vocab_size in VOCABULARIES:
        hashes = token_hashes(vocab_size)
        rows = 5 * len(FILTERS) if vocab_size < 1000 else len(FILTERS)
        logits = torch.randn(rows, vocab_size) * torch.rand(rows, 1) * 6
        logits[1, : vocab_size // 2] = -torch.inf
        logits[2] = (logits[2] * 2).round() / 2  # many equals
        params = torch.tensor([[0, k or vocab_size, p, m] for k, p, m in FILTERS] * (rows // len(FILTERS)))
        params[:, 0] = torch.rand(rows) + 0.1
        params[:, 1].clamp_(max=vocab_size)
        keys = torch.from_numpy(row_keys(np.arange(rows, dtype=np.uint64), np.arange(rows)))
        ids = sample.draw(logits, params, keys, hashes).tolist()
        noise = -(-(-uniform(keys, hashes.expand(rows, -1)).double()).log1p()).log()
        for row, token in enumerate(ids):
            expected, close = drawn(logits[row], params[row], noise[row])
            assert token == expected or (token == -1 and close), (vocab_size, row, token, expected)
        # The tokens of the largest noise, with logits that put one a little ahead: small errors would choose another.
        noisiest = noise.topk(min(8, vocab_size)).indices
        level = (-noise * params[:, :1]).float().gather(1, noisiest)
        for ahead in range(noisiest.shape[1]):
            even = level.clone()
            even[:, ahead] += 0.002 * params[:, 0]
            few = torch.full_like(logits, -torch.inf).scatter_(1, noisiest, even)
            plain = torch.tensor([[0, vocab_size, ALL, 0]] * rows)
            plain[:, 0] = params[:, 0]
            assert torch.equal(sample.draw(few, plain, keys, hashes), noisiest[:, ahead])


def check_undecided() -> None:
    """Say so where equal noisy scores, or a limit that is just reached, leave the choice to rounding; take odd rows."""
    keys = torch.from_numpy(row_keys(np.arange(64, dtype=np.uint64), np.arange(64)))
    alike, plain = torch.zeros(40, dtype=torch.int32), torch.tensor([[1.0, 40, ALL, 0]])
    assert sample.draw(torch.zeros(1, 40), plain, keys[:1], alike).tolist() == [-1]
    halves = torch.tensor([0.5, 0.25, 0.25]).log().repeat(64, 1)
    limited = torch.tensor([[1.0, 3, 0.5, 0]]).repeat(64, 1)
    assert set(sample.draw(halves, limited, keys, token_hashes(3)).tolist()) == {0, -1}
    failed = torch.full((3, 40), -torch.inf)
    failed[1, 3], failed[2, :5] = torch.inf, torch.nan
    ids = sample.draw(failed, plain.expand(3, -1), keys[:3], token_hashes(40))
    assert bool((ids < 40).all())


def check_logprobs() -> None:
    """Values within float32 of float64, ranks that count larger logits, the likeliest of each row, named tokens."""
    for vocab_size in VOCABULARIES:
        logits = torch.randn(9, vocab_size) * 5 + 30
        logits[1, 1:] = -torch.inf
        logits[2] = logits[2].round()
        token_ids, named = torch.randint(vocab_size, (9,)), torch.randint(vocab_size, (9, 3))
        exact = logits.double().log_softmax(-1)
        for num in (0, 1, 5, 20, 4000):
            values, ranks, ids, top, found = logprobs.logprobs(logits, token_ids, num, named if num else None)
            _close(values, exact.gather(1, token_ids[:, None])[:, 0])
            assert torch.equal(ranks, (logits > logits.gather(1, token_ids[:, None])).sum(-1, dtype=torch.int32) + 1)
            assert ids.shape == (9, min(num, vocab_size))
            assert all(len(set(row)) == len(row) for row in ids.tolist())
            assert torch.equal(logits.gather(1, ids).sort(descending=True).values, logits.topk(ids.shape[1]).values)
            _close(top, exact.gather(1, ids))
            _close(found, exact.gather(1, named) if num else exact[:, :0])
    broken = torch.randn(3, 300)
    broken[0, 7], broken[1, 299], broken[2] = torch.nan, torch.inf, -torch.inf
    values, *_ = logprobs.logprobs(broken, torch.tensor([3, 4, 5]), 2, None)
    assert bool(values.isnan().all())


def check_argmax() -> None:
    """Of equal logits the lowest id; -1 where the largest is not finite, or any is NaN, wherever that stands."""
    for vocab_size in (*VOCABULARIES, 512, 1_000):
        logits = torch.randn(40, vocab_size)
        for row in range(20):  # the largest, twice from row 10 on
            at = torch.randint(vocab_size, (2 if row >= 10 else 1,))
            logits[row, at] = 9.0
        logits[20, vocab_size - 1] = 9.0
        logits[21, 0] = 9.0
        logits[22] = -torch.inf
        logits[23, : vocab_size - 1] = -torch.inf
        logits[24, vocab_size // 2] = torch.inf
        for row in range(25, 35):
            logits[row, torch.randint(vocab_size, (1,))] = torch.nan
        logits[35, vocab_size - 1] = torch.nan
        logits[36] = 0.0
        ids, tops = argmax.argmax(logits)
        finite = logits.amax(-1).isfinite()
        assert torch.equal(ids, torch.where(finite, torch.from_numpy(logits.numpy().argmax(1)), -1))
        assert torch.equal(tops.nan_to_num(7), logits.amax(-1).nan_to_num(7))


def check_mask() -> None:
    """Forbid what a mask forbids, in its row only; leave every other logit, NaN included, as it is."""
    for vocab_size in VOCABULARIES:
        logits = torch.randn(6, vocab_size)
        logits[:, vocab_size // 2] = torch.nan
        allowed = torch.rand(3, -(-vocab_size // 32) * 32) < torch.tensor([[0.0], [0.5], [1.0]])
        masks = torch.from_numpy(np.packbits(allowed.numpy(), axis=1, bitorder="little").view(np.int32))
        rows = torch.tensor([4, 0, 3])
        expected = logits.clone()
        expected[rows] = expected[rows].masked_fill(~allowed[:, :vocab_size], -torch.inf)
        mask.mask(logits, masks, rows)
        assert torch.equal(logits.nan_to_num(7), expected.nan_to_num(7))


def _close(actual: Tensor, expected: Tensor) -> None:
    infinite = expected == -torch.inf
    assert torch.equal(actual == -torch.inf, infinite)
    error = (actual.double() - expected).masked_fill(infinite, 0).abs()
    assert bool((error <= 4e-6 * (1 + expected.abs().masked_fill(infinite, 0))).all()), float(error.max())
