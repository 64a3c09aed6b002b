"""Sampling without a sort: the very tokens that the reference sampler chooses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from torch import Tensor

from cuda_kernels import paged_attn, sample
from cuda_kernels.gemm import choose_splits
from cuda_kernels.launch import using
from tests.kernels.helpers import count, sharing_rows, simulate
from tools.kernel_lab.cases import poisoned
from tools.kernel_lab.recorded_step import H200
from tools.ptx_simulator import SimulatedLauncher
from tools.ptx_simulator.counters import Counters
from trio_llm.model.sampling.counter_rng import add_gumbel, row_keys, token_hashes

OFF = torch.inf  # of top_p


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


def dice(rows: int) -> Tensor:
    """Return keys [R, 2] of as many seeds."""
    return torch.from_numpy(row_keys(np.arange(rows, dtype=np.uint64), np.arange(rows)))


def assert_as_by_sorting(logits: Tensor, params: Tensor, blocks: int) -> None:
    """Let rows be shared and compare their tokens."""
    keys, hashes = dice(len(params)), token_hashes(logits.shape[1])
    with sharing_rows(blocks):
        (ids,) = simulate(lambda: (sample.sample(logits, params, keys, hashes),))
    assert ids.tolist() == sorting(logits, params, keys, hashes).tolist()


@pytest.mark.parametrize(("vocab", "blocks"), [(300, 1), (300, 4), (1009, 3), (33, 2)])
def test_the_tokens_of_sorting_are_chosen(vocab: int, blocks: int) -> None:
    """Greedy, plain, and every filter alone and together: the same ids as with a sort, whatever warp runs first."""
    torch.manual_seed(0)
    settings = [(0, vocab, OFF, 0), (1, vocab, OFF, 0), (0.7, 5, OFF, 0), (1.3, vocab, 0.8, 0), (1, vocab, OFF, 0.1),
                (1, 30, 0.6, 0), (2, 20, 0.9, 0.02), (1, 1, 0.5, 0), (0.5, 3, 0.001, 0)]  # fmt: skip
    params = torch.tensor(settings)
    logits = torch.randn(len(params), vocab) * 3
    logits[:, vocab // 3 : vocab // 3 + 10] = logits[:, :10]  # equals
    assert_as_by_sorting(logits, params, blocks)


@pytest.mark.parametrize("blocks", [1, 3])
def test_tokens_of_the_bucket_where_a_filter_cuts_are_told_apart(blocks: int) -> None:
    """A hundred tokens, ten of them equal, share a bucket and nearly all mass: cut by number, by mass, by both."""
    torch.manual_seed(3)
    settings = [(1, 40, OFF, 0), (1, 400, 0.5, 0), (1, 60, 0.7, 0), (1, 400, 0.995, 0), (1, 400, OFF, 0.3678)] * 2
    logits = torch.full((len(settings), 400), -9.0)
    logits[:, 7] = 0
    crowd = -1 - torch.rand(len(settings), 100) / 130
    crowd[:, 20:30] = crowd[:, 30:31]
    logits[:, 150:250] = crowd
    assert_as_by_sorting(logits, torch.tensor(settings), blocks)


@pytest.mark.parametrize("blocks", [1, 3])
def test_tokens_that_no_dice_can_choose_have_their_mass(blocks: int) -> None:
    """Of three hundred hopeless ones it is a tenth, without which top_p would drop the second likeliest."""
    logits = torch.full((8, 400), -7.95)
    logits[:, 310:] = -torch.inf
    logits[:, 5], logits[:, 301] = 0, -0.511
    assert_as_by_sorting(logits, torch.tensor([(1, 400, 0.6, 0)] * 8), blocks)


def test_a_token_does_not_depend_on_how_a_row_is_shared() -> None:
    """Flat rows, where the last digits of a mass decide: the same tokens by one block, two, and seven larger ones."""
    torch.manual_seed(4)
    params = torch.tensor([(1, 900, 0.9, 0), (3, 700, 0.99, 0), (1, 900, OFF, 0)] * 4)
    logits, keys, hashes = torch.randn(len(params), 900) / 10, dice(len(params)), token_hashes(900)
    chosen: list[list[int]] = []
    for blocks, threads in ((1, 64), (2, 64), (7, 128)):
        with sharing_rows(blocks, threads):
            (ids,) = simulate(lambda: (sample.sample(logits, params, keys, hashes),), orders=(0,))
        chosen.append(ids.tolist())
    assert chosen[0] == chosen[1] == chosen[2] == sorting(logits, params, keys, hashes).tolist()


@pytest.mark.parametrize("blocks", [1, 2])
def test_the_first_of_the_largest_wins(blocks: int) -> None:
    """Without parameters every row is greedy; a row with a NaN, an infinity or nothing but -inf says so."""
    logits = torch.zeros(6, 33)
    logits[0, [7, 20]], logits[1, 32], logits[2, 3], logits[3, 30] = 4, 1, torch.nan, torch.inf
    logits[4, :], logits[5, 9] = -torch.inf, -torch.tensor(torch.nan)  # a NaN of either sign
    with sharing_rows(blocks):
        (ids,) = simulate(lambda: (sample.sample(logits, None, None, token_hashes(33)),), orders=(0,))
    assert ids.tolist() == [7, 32] + [sample.NOT_FINITE] * 4


@pytest.mark.parametrize(("vocab", "blocks"), [(33, 1), (300, 1), (301, 3)])
def test_logprobs(vocab: int, blocks: int) -> None:
    """Log-probability and rank are those of a log-softmax, also where a block finds nothing but -inf."""
    logits, ids = torch.randn(3, vocab) * 4, torch.tensor([0, 5, vocab - 1])
    logits[1, vocab // 3 : vocab - 1] = -torch.inf
    with sharing_rows(blocks):
        logprobs, ranks = simulate(lambda: sample.token_logprobs(logits, ids))
    expected = logits.double().log_softmax(-1)
    chosen = expected.gather(1, ids[:, None])
    torch.testing.assert_close(logprobs.double(), chosen[:, 0], rtol=1e-5, atol=1e-5)
    assert ranks.tolist() == ((expected > chosen).sum(-1) + 1).tolist()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logprobs_of_a_row_that_is_not_finite_are_nan(bad: float) -> None:
    """By which the host knows it."""
    logits = torch.randn(1, 90)
    logits[0, 70] = bad
    with sharing_rows(3):
        logprobs, _ = simulate(lambda: sample.token_logprobs(logits, torch.tensor([2])), orders=(0,))
    assert logprobs.isnan().all()


# What a row asks for, the most sweeps over its logits, and instructions for each of them (measured, plus a tenth).
WORK = [((0.0, 4096, OFF, 0.0), 1.01, 18), ((1.0, 4096, OFF, 0.0), 3.03, 76), ((0.7, 20, OFF, 0.0), 3.4, 92),
        ((0.7, 20, 0.8, 0.0), 3.4, 121)]  # fmt: skip


@pytest.mark.parametrize(("params", "most_sweeps", "most_instructions"), WORK, ids=str)
def test_rows_are_swept_few_times(params: tuple[float, ...], most_sweeps: float, most_instructions: float) -> None:
    """Logits are read in full sectors, once where a row is greedy; each filter costs a few sweeps more."""
    torch.manual_seed(2)
    logits = torch.randn(4, 4096) * 3
    args = (torch.tensor([params]).repeat(4, 1), torch.ones(4, 2, dtype=torch.int32), token_hashes(4096))
    with sharing_rows(1):
        counted = count(lambda: sample.sample(logits, *args))
    sweeps, instructions = counted.sectors["ld"] * 8 / logits.numel(), counted.issued.total() * 32 / logits.numel()
    assert sweeps < most_sweeps and instructions < most_instructions
    assert counted.sectors["ld"] < 1.05 * counted.sectors_least["ld"]


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Share rows as on an H200."""
    monkeypatch.setattr(paged_attn, "SIMULATED", H200)
    paged_attn.device_of.cache_clear()
    yield
    paged_attn.device_of.cache_clear()


@pytest.mark.parametrize(
    ("rows", "vocab", "blocks"), [(1, 151_936, 38), (32, 151_936, 8), (256, 151_936, 1), (1, 999, 1)]
)
@pytest.mark.usefixtures("h200")
def test_few_rows_are_shared_by_many_blocks(rows: int, vocab: int, blocks: int) -> None:
    """By as many as two a multiprocessor, of 4,096 logits at least; all of them are some block's."""
    logits = torch.empty((rows, vocab), device="meta")
    span, found = sample.share_row(logits, choose_splits(rows, H200))
    assert found == blocks and span * (found - 1) < vocab <= span * found


class Busiest(SimulatedLauncher):
    """Remembers how many instructions the busiest block of each launch executed."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[int] = []

    def launch(self, *args: Any) -> None:
        counters = Counters()
        SimulatedLauncher(counters=counters).launch(*args)
        self.blocks.append(max(counters.by_block.values()))


# Filters, and instructions of the busiest block of each kernel (measured, plus a tenth).
BUSIEST = [((0.5, 0, OFF, 0.0), 8800, 10600), ((0.5, 0, 0.95, 0.0), 8800, 31000), ((0.5, 50, 0.95, 0.0), 8800, 31000)]


@pytest.mark.parametrize("vocab", [151_936, 262_144])
@pytest.mark.usefixtures("h200")
def test_rows_of_real_vocabularies(vocab: int) -> None:
    """The tokens of sorting; and no block of a row has more to do than its part and what the last one does."""
    torch.manual_seed(5)
    logits, hashes, keys = torch.randn(1, vocab) * 3, token_hashes(vocab), dice(1)
    for (temperature, top_k, top_p, min_p), *most in BUSIEST:
        params, launcher = torch.tensor([(temperature, top_k or vocab, top_p, min_p)]), Busiest()
        with using(launcher), poisoned():
            ids = sample.sample(logits, params, keys, hashes)
        assert ids.tolist() == sorting(logits, params, keys, hashes).tolist()
        assert all(one < bound for one, bound in zip(launcher.blocks, most, strict=True)), launcher.blocks


def test_edited_rows_are_read_twice() -> None:
    """Edits cost one sweep more and the row's mask; rows without any pay the same, as few as they are."""
    logits, none = torch.randn(3, 4096), torch.zeros(0, dtype=torch.int64)
    starts = torch.zeros(4, 4, dtype=torch.int32)
    starts[3, 2:] = 1  # the second row has a mask
    masks = torch.full((1, 128), -1, dtype=torch.int32)
    edits = sample.Edits(starts, none, none, none.float(), none, torch.zeros(4, 0), masks)
    with sharing_rows(1):
        counted = count(lambda: sample.sample(logits, None, None, token_hashes(4096), edits))
    assert 2 < counted.sectors["ld"] * 8 / logits.numel() < 2.15


def test_supports_says_why_not() -> None:
    """Logits of another type are named."""
    assert sample.supports(torch.zeros(1, 9)) is None
    assert sample.supports(torch.zeros(1, 9).half()) == "dtype torch.float16"
    assert sample.supports(torch.zeros(1, 1).expand(1, 1 << 24)) == "a vocabulary of 16777216"


@attrs.frozen
class Tape:
    """Runs launches and keeps them, as a CUDA graph does: the same arguments at every replay."""

    launches: list[tuple[Any, ...]] = attrs.field(factory=list)

    def launch(self, *args: Any) -> None:
        self.launches.append(args)
        SimulatedLauncher().launch(*args)


def test_a_replay_chooses_from_the_logits_of_now() -> None:
    """Nothing of the last replay is left: not in the workspace, which holds anything at first, nor in the tickets."""
    torch.manual_seed(7)
    params = torch.tensor([(1, 500, 0.8, 0), (0.7, 30, 0.9, 0), (1, 500, OFF, 0), (0, 500, OFF, 0)])
    keys, hashes, tape = dice(len(params)), token_hashes(500), Tape()
    logits = torch.empty(len(params), 500)
    with sharing_rows(3), using(tape), poisoned():
        ids = sample.sample(logits.normal_(), params, keys, hashes)
    assert [kernel.entry for kernel, *_ in tape.launches] == ["likeliest", "draw"]
    for scale in (1, 3):
        expected = sorting(logits.normal_(std=scale), params, keys, hashes)
        for launch in tape.launches:
            SimulatedLauncher().launch(*launch)
        assert ids.tolist() == expected.tolist()
