"""Sampling without a sort: the very tokens that the reference sampler chooses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from cuda_kernels import sample
from tests.kernels.helpers import simulate
from trio_llm.model.counter_rng import race, row_keys, token_hashes

VOCAB = 300


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two warps a row instead of 32: less to simulate, and still more than one."""
    monkeypatch.setattr(sample, "THREADS", 64)


def sorting(logits: Tensor, params: Tensor, keys: Tensor, hashes: Tensor) -> Tensor:
    """Choose by sorting, in float64 but for the dice."""
    ids: list[int] = []
    for row, (temperature, top_k, top_p, min_p), key in zip(logits.double(), params.tolist(), keys, strict=True):
        scores = (row - row.max()) / (temperature or 1.0)
        ordered = scores.sort(descending=True).values
        kept = (ordered >= np.log(min_p) if min_p else ordered > -torch.inf) & (ordered >= ordered[int(top_k) - 1])
        mass = ordered.exp() * kept
        ahead = mass.cumsum(0) - mass
        threshold = ordered[kept & (ahead < top_p * mass.sum())].min()
        lots = race(scores.masked_fill(scores < threshold, -torch.inf)[None].float(), key[None], hashes)
        ids.append(int((scores if temperature == 0 else lots[0]).argmax()))
    return torch.tensor(ids)


def test_the_tokens_of_sorting_are_chosen() -> None:
    """Greedy, plain, and every filter alone and together: the same ids as with a sort, whatever warp runs first."""
    torch.manual_seed(0)
    off = torch.inf
    settings = [(0, VOCAB, off, 0), (1, VOCAB, off, 0), (0.7, 5, off, 0), (1.3, VOCAB, 0.8, 0), (1, VOCAB, off, 0.1),
                (1, 40, 0.6, 0), (2, 20, 0.9, 0.02), (1, 1, 0.5, 0), (0.5, 3, 0.001, 0)]  # fmt: skip
    params = torch.tensor(settings)
    logits = torch.randn(len(params), VOCAB) * 3
    logits[:, 100:140] = logits[:, :40]  # equals
    keys = torch.from_numpy(row_keys(np.arange(len(params), dtype=np.uint64), np.arange(len(params))))
    hashes = token_hashes(VOCAB)
    ids, tops = simulate(lambda: sample.sample(logits, params, keys, hashes))
    assert ids.tolist() == sorting(logits, params, keys, hashes).tolist()
    assert torch.equal(tops, logits.amax(-1))


def test_masks_hide_tokens() -> None:
    """A token whose bit is not set is never chosen, greedily or at random; a row without any says so."""
    logits = torch.randn(4, 70)
    allowed = torch.zeros(4, 3, dtype=torch.int32)
    allowed[0, 1], allowed[1, 2], allowed[2, 0] = 1 << 5, 1 << 3, -(2**31)
    params = torch.tensor([[0, 70, torch.inf, 0], [1, 70, torch.inf, 0], [1, 9, 0.9, 0], [1, 70, torch.inf, 0]])
    args = (logits, params, torch.ones(4, 2, dtype=torch.int32), token_hashes(70), allowed)
    ids, tops = simulate(lambda: sample.sample(*args), orders=(0,))
    assert ids[:3].tolist() == [37, 67, 31] and torch.equal(tops[:3], logits[[0, 1, 2], [37, 67, 31]])
    assert tops[3] == -torch.inf


def test_greedy_needs_no_parameters_and_shows_nan() -> None:
    """The first of the largest wins; a NaN is reported as the row's top."""
    logits = torch.zeros(3, 33)
    logits[0, [7, 20]], logits[1, 32], logits[2, 3] = 4.0, 1.0, torch.nan
    ids, tops = simulate(lambda: sample.sample(logits, None, None, token_hashes(33)), orders=(0,))
    assert ids[:2].tolist() == [7, 32] and tops[:2].tolist() == [4, 1] and tops[2].isnan()


@pytest.mark.parametrize("vocab", [33, 300])
def test_logprobs(vocab: int) -> None:
    """Log-probability and rank are those of a log-softmax."""
    logits, ids = torch.randn(3, vocab) * 4, torch.tensor([0, 5, vocab - 1])
    logprobs, ranks = simulate(lambda: sample.token_logprobs(logits, ids))
    expected = logits.double().log_softmax(-1)
    chosen = expected.gather(1, ids[:, None])
    torch.testing.assert_close(logprobs.double(), chosen[:, 0], rtol=1e-5, atol=1e-5)
    assert ranks.tolist() == ((expected > chosen).sum(-1) + 1).tolist()


def test_drafts_stand_until_the_first_difference() -> None:
    """Leading matches count, a match after a difference does not, and no drafts are none accepted."""
    sampled, drafts = torch.tensor([5, 6, 7, 8, 1, 2, 3, 9]), torch.tensor([5, 6, 0, -1, 1, 2, -1, -1])
    cu = torch.tensor([0, 4, 7, 8], dtype=torch.int32)
    (accepted,) = simulate(lambda: (sample.verify_drafts(sampled, drafts, cu),), orders=(0,))
    assert accepted.tolist() == [2, 2, 0]


def test_supports_says_why_not() -> None:
    """Logits of another type are named."""
    assert sample.supports(torch.zeros(1, 9)) is None
    assert sample.supports(torch.zeros(1, 9).half()) == "dtype torch.float16"
    assert sample.supports(torch.zeros(1, 1).expand(1, 1 << 24)) == "a vocabulary of 16777216"
