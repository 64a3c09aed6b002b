"""Bugs of the sampler, and what must catch them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cuda_kernels import sample
from tests.kernels.attention_bugs import Bug
from tests.kernels.helpers import sharing_rows, simulate
from tests.kernels.test_sample import assert_as_by_sorting


def check_sample() -> None:
    """Choose greedily, equals among the largest."""
    logits = torch.randn(3, 5000)
    logits[:, 3000] = logits[:, 4000] = 9.0
    logits[0, 4000], logits[0, 3000] = 0.0, -0.0
    logits[0, :3000] = logits[0, 3001:4000] = logits[0, 4001:] = -1.0
    (ids,) = simulate(lambda: (sample.sample(logits, None, None, torch.zeros(5000, dtype=torch.int32)),))
    assert ids.tolist() == [3000] * 3


def check_edits() -> None:
    """Choose greedily after edits: tokens 40 to 79 are biased in reverse, token 40 penalised too, 3 and 70 masked."""
    logits = torch.zeros(2, 100)
    logits[1, 3] = torch.nan
    biased, seen = torch.arange(79, 39, -1).repeat(2), torch.tensor([40, 50])
    biased[40:] += 100
    bits = torch.full((2, 4), -1, dtype=torch.int32)
    bits[:, 0] -= 1 << 3
    starts = torch.tensor([[0, 1, 2], [0, 40, 80], [0, 2, 2], [0, 1, 2]], dtype=torch.int32)
    penalties = torch.tensor([[2.0, 0], [4, 2], [0.25, 9], [0.5, 9]])
    bias = torch.full((80,), 4.0)
    bias[[39, 79]] = 30.0  # what token 40 is left with: 30 / 4 - 2 * 0.5 - 0.25
    bias[8] = 6.2  # token 71, just below
    masked = torch.tensor([70, 170])
    edits = sample.Edits(starts, masked, biased, bias, seen, penalties, bits)

    def run() -> tuple[Tensor, ...]:
        edited = logits.clone()
        return sample.sample(edited, None, None, torch.zeros(100, dtype=torch.int32), edits), edited

    ids, edited = simulate(run)
    assert ids.tolist() == [40, sample.NOT_FINITE]
    assert edited[0, [40, 50, 70, 71, 72]].tolist() == pytest.approx([6.25, 2, -torch.inf, 6.2, 4])


def check_draw() -> None:
    """Draw with three blocks a row: cut by number, by mass of several kinds, and not at all."""
    rows, vocab = 8, 400
    logits = torch.full((5, rows, vocab), -9.5)
    logits[:, :, 5] = 0
    logits[0, :, 150:250] = -1 - torch.rand(rows, 100) / 130  # in a bucket
    logits[1, :, 6:], logits[1, :, 301] = -7.95, -0.511  # kept only if the rest has its mass
    logits[2, :, 6:] = -6 - torch.rand(rows, vocab - 6) / 50  # a mass of many small ones
    logits[3], logits[3, :, :133] = -1.5, -torch.rand(rows, 133)  # less likely tokens in other blocks
    logits[4] = torch.randn(rows, vocab) * 2
    logits[:, 1::2] = logits[:, 1::2].flip(2)
    filters = [(40, torch.inf), (vocab, 0.6), (vocab, 0.9), (vocab, 0.6), (vocab, torch.inf)]
    params = torch.tensor([(1, top_k, top_p, 0) for top_k, top_p in filters])
    assert_as_by_sorting(logits.flatten(0, 1), params.repeat_interleave(rows, 0), blocks=3)


def check_logprobs() -> None:
    """Take log-probabilities, four blocks a row."""
    logits, ids = torch.randn(3, 500) * 3, torch.tensor([9, 499, 250])
    with sharing_rows(4):
        logprobs, ranks = simulate(lambda: sample.token_logprobs(logits, ids))
    expected, own = logits.double().log_softmax(-1), logits.gather(1, ids[:, None])
    torch.testing.assert_close(logprobs.double(), expected.gather(1, ids[:, None])[:, 0], rtol=1e-5, atol=1e-5)
    assert ranks.tolist() == ((logits > own).sum(1) + 1).tolist()


def draw(old: str, new: str) -> Bug:
    """Return a bug of rows that several blocks share."""
    return Bug("sample.cu", old, new, check_draw)


SAMPLE_BUGS = {
    "the last of equals": Bug("sample.cu", "(0xffffffffu - (u32)id)", "(u32)id", check_sample),
    "scratch read too early": Bug(
        "sample.cu", "= v;\n  __syncthreads();\n  v = scratch", "= v;\n  v = scratch", check_sample
    ),
    "negative zero is less": Bug("sample.cu", "row.logits[i] + 0.f", "row.logits[i]", check_sample),
    "a mask hides a NaN": Bug("sample.cu", "finite = fabsf(from", "finite = true || fabsf(from", check_edits),
    "penalties before bias": Bug(
        "sample.cu", "+= bias[i];\n  __syncthreads();", "+= bias[i];", check_edits
    ),
    "presence of what the prompt holds": Bug("sample.cu", "count > 0.f ? presence : 0.f", "presence", check_edits),
    "frequency and presence swapped": Bug(
        "sample.cu", "presence = penalties[2 * num_seen + i]", "presence = penalties[3 * num_seen + i]", check_edits
    ),
    "draw: a histogram is not cleared": draw("histograms[(s64)r * HISTOGRAM_WORDS + i] = 0;", ";"),
    "draw: a carry is lost": draw(" + (before + low < low)", ""),
    "draw: tickets are not given back": draw("if (*last) *ticket = 0;", ""),
    "draw: the largest logit of one part": draw("best = max(best, own[b * 2 + 1])", "best = max(best, own[1])"),
    "draw: a part's masses for the row's": draw("blocks > 1 ? 1.f : want.top_p", "want.top_p"),
    "draw: a bucket is kept whole": draw(
        "if (winner > best_of(h, kept.sure, kept.maybe, scratch)) return winner;",
        "return max(winner, best_of(h, kept.sure, kept.maybe, scratch));",
    ),
    "draw: no barrier before buckets are added up": draw("__syncthreads();  // all have added", ""),
    "draw: the first lot of a bucket wins": draw("lot > h.winners[bucket]", "h.winners[bucket] == 0"),
    "draw: hopeless tokens have no mass": draw("&& count) add(h, LAST, count, mass);", "&& count) ;"),
    "draw: past the end of a row": draw("min(vocab, (int)(blockIdx.y + 1) * span)", "(int)(blockIdx.y + 1) * span"),
    "draw: a winner that is not handed on": draw("atomicMax(all.winners, winner);", ";"),
    "draw: a sweep too few": draw("max(shift - 11, 0)", "max(shift - 20, 0)"),
    "masses of parts by their own largest": Bug(
        "sample.cu", "own[b * 4 + 1] * exp2_fast((own[b * 4] - top) * LOG2E)", "own[b * 4 + 1]", check_logprobs
    ),
}  # fmt: skip
