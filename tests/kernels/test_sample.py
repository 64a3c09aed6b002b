"""Sampling without a sort: the very tokens that the reference sampler chooses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from cuda_kernels import sample
from tests.kernels.helpers import count, simulate
from trio_llm.model.sampling.counter_rng import add_gumbel, row_keys, token_hashes

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
        noisy = add_gumbel(scores.masked_fill(scores < threshold, -torch.inf)[None].float(), key[None], hashes)
        ids.append(int((scores if temperature == 0 else noisy[0]).argmax()))
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
    (ids,) = simulate(lambda: (sample.sample(logits, params, keys, hashes),))
    assert ids.tolist() == sorting(logits, params, keys, hashes).tolist()


def test_the_first_of_the_largest_wins() -> None:
    """Without parameters every row is greedy; a row with a NaN, an infinity or nothing but -inf says so."""
    logits = torch.zeros(6, 33)
    logits[0, [7, 20]], logits[1, 32], logits[2, 3], logits[3, 30] = 4, 1, torch.nan, torch.inf
    logits[4, :], logits[5, 9] = -torch.inf, -torch.tensor(torch.nan)  # a NaN of either sign
    (ids,) = simulate(lambda: (sample.sample(logits, None, None, token_hashes(33)),), orders=(0,))
    assert ids.tolist() == [7, 32] + [sample.NOT_FINITE] * 4


@pytest.mark.parametrize("vocab", [33, 300])
def test_logprobs(vocab: int) -> None:
    """Log-probability and rank are those of a log-softmax."""
    logits, ids = torch.randn(3, vocab) * 4, torch.tensor([0, 5, vocab - 1])
    logprobs, ranks = simulate(lambda: sample.token_logprobs(logits, ids))
    expected = logits.double().log_softmax(-1)
    chosen = expected.gather(1, ids[:, None])
    torch.testing.assert_close(logprobs.double(), chosen[:, 0], rtol=1e-5, atol=1e-5)
    assert ranks.tolist() == ((expected > chosen).sum(-1) + 1).tolist()


# What a row asks for, the most sweeps over its logits, and instructions for each of them (measured, plus a tenth).
WORK = [((0.0, 4096, torch.inf, 0.0), 1.01, 18), ((1.0, 4096, torch.inf, 0.0), 3.03, 83),
        ((0.7, 20, torch.inf, 0.0), 4.8, 108), ((0.7, 20, 0.8, 0.0), 10.5, 294)]  # fmt: skip


@pytest.mark.parametrize(("params", "most_sweeps", "most_instructions"), WORK, ids=str)
def test_rows_are_swept_few_times(params: tuple[float, ...], most_sweeps: float, most_instructions: float) -> None:
    """Logits are read in full sectors, once where a row is greedy; each filter costs a few sweeps more."""
    torch.manual_seed(2)
    logits = torch.randn(4, 4096) * 3
    args = (torch.tensor([params]).repeat(4, 1), torch.ones(4, 2, dtype=torch.int32), token_hashes(4096))
    counted = count(lambda: sample.sample(logits, *args))
    sweeps, instructions = counted.sectors["ld"] * 8 / logits.numel(), counted.issued.total() * 32 / logits.numel()
    assert sweeps < most_sweeps and instructions < most_instructions
    assert counted.sectors["ld"] < 1.05 * counted.sectors_least["ld"]


def test_edited_rows_are_read_twice() -> None:
    """Edits cost one sweep more and the row's mask; rows without any pay the same, as few as they are."""
    logits, none = torch.randn(3, 4096), torch.zeros(0, dtype=torch.int64)
    starts = torch.zeros(4, 4, dtype=torch.int32)
    starts[3, 2:] = 1  # the second row has a mask
    masks = torch.full((1, 128), -1, dtype=torch.int32)
    edits = sample.Edits(starts, none, none, none.float(), none, torch.zeros(4, 0), masks)
    counted = count(lambda: sample.sample(logits, None, None, token_hashes(4096), edits))
    assert 2 < counted.sectors["ld"] * 8 / logits.numel() < 2.15


def test_supports_says_why_not() -> None:
    """Logits of another type are named."""
    assert sample.supports(torch.zeros(1, 9)) is None
    assert sample.supports(torch.zeros(1, 9).half()) == "dtype torch.float16"
    assert sample.supports(torch.zeros(1, 1).expand(1, 1 << 24)) == "a vocabulary of 16777216"
