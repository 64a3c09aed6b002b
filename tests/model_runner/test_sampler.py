from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from tests.model_runner import reference
from trio_llm.messages import Admission, TokenLogprobs
from trio_llm.model.ops.logit_edits import forbid
from trio_llm.model.sampling.row_params import SamplingRows
from trio_llm.model.sampling.sampler import NOT_FINITE, NOTHING_LEFT, Sampler
from trio_llm.params import SamplingParams

CPU = torch.device("cpu")
EOS = (2, 3)
GREEDY = SamplingParams(temperature=0)
Row = tuple[SamplingParams, tuple[int, ...], tuple[int, ...]]  # params, prompt, output


def send(columns: Sequence[NDArray[Any]]) -> list[Tensor]:
    """Hand a step's columns to a sampler on this machine."""
    return [torch.from_numpy(column) for column in columns]


@attrs.frozen
class Result:
    """One token per row, and what those who asked are told of it."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None] | None


def sample(logits: np.ndarray, rows: list[Row], order: list[int] | None = None) -> Result:
    """Sample one token for each row as the runner does: admit the prompts, tell the outputs, ask.

    `order` are the permanent rows that the sequences sit in; the default is 0, 1, 2...
    """
    vocab_size = logits.shape[1]
    order = order or list(range(len(rows)))
    state = SamplingRows(vocab_size, EOS, max(order) + 1, send)
    for row, (params, prompt, output) in zip(order, rows, strict=True):
        state.admit(row, Admission(row, prompt, len(prompt), params), params)
        if row in state.history_rows:
            state.set_tokens(row, len(prompt), output)
    positions = np.array([len(prompt) + len(output) for _, prompt, output in rows], np.int64)
    batch = state.select(np.array(order, np.intp), positions)
    sampled = Sampler(vocab_size, CPU).sample(torch.from_numpy(logits.astype(np.float32)), batch)
    return Result(sampled.token_ids.tolist(), sampled.logprobs())


def make_logits(seed: int, rows: int, vocab_size: int, scale: float = 3.0, grid: float = 0.0) -> np.ndarray:
    """Random logits; a grid makes many of them equal."""
    logits = np.random.default_rng(seed).normal(size=(rows, vocab_size)) * scale
    return np.round(logits / grid) * grid if grid else logits


def assert_agrees(
    logits: np.ndarray, row: Row, token_id: int, *, eos: Sequence[int] = EOS, error: float = 1e-5
) -> None:
    """Compare one sampled token with the reference, forgiving what float32 cannot tell apart.

    Args:
        error: How far the logits may be from those that were sampled from.
    """
    params, prompt, output = row
    x = reference.edited(logits.astype(np.float32), params, prompt, output, eos)
    if x.max() == -math.inf:
        assert token_id == NOTHING_LEFT
    elif params.temperature == 0 or params.top_k == 1:
        assert x[token_id] >= x.max() - error
    else:
        assert params.seed is not None
        lots = reference.lots(x, params, params.seed, len(prompt) + len(output))
        slack = error + 2 * error / params.temperature
        assert reference.kept(x, params, slack)[token_id]
        surely_kept = reference.kept(x, params, -slack)
        assert lots[token_id] >= lots[surely_kept].max(initial=-math.inf) - slack


@st.composite
def sampling_params(draw: st.DrawFn, vocab_size: int) -> SamplingParams:
    """Any mixture of parameters, each often left at its default."""
    token = st.integers(0, vocab_size - 1)

    def maybe(strategy: st.SearchStrategy, default: object) -> object:
        return draw(st.one_of(st.just(default), strategy))

    return SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.01, 0.3, 1.0, 2.0])),
        top_k=maybe(st.integers(-1, vocab_size + 1), 0),
        top_p=maybe(st.floats(0.01, 1.0), 1.0),
        min_p=maybe(st.floats(0.0, 1.0), 0.0),
        presence_penalty=maybe(st.floats(-2, 2), 0.0),
        frequency_penalty=maybe(st.floats(-2, 2), 0.0),
        repetition_penalty=maybe(st.floats(0.1, 2.0), 1.0),
        logit_bias=maybe(st.dictionaries(token, st.floats(-100, 100), max_size=4), {}),
        allowed_token_ids=maybe(st.lists(token, max_size=5).map(tuple), None),
        bad_words_token_ids=maybe(
            st.lists(st.lists(token, min_size=1, max_size=3).map(tuple), max_size=3).map(tuple), ()
        ),
        min_tokens=maybe(st.integers(0, 4), 0),
        stop_token_ids=maybe(st.lists(token, max_size=2).map(tuple), ()),
        seed=draw(st.integers(-(2**63), 2**63 - 1)),
    )


@st.composite
def batches(draw: st.DrawFn) -> tuple[np.ndarray, list[Row]]:
    """A few rows of different parameters over vocabularies around the width and number of candidates."""
    vocab_size = draw(st.sampled_from([5, 64, 65, 300]))
    count = draw(st.integers(1, 5))
    tokens = st.lists(st.integers(0, min(vocab_size, 8) - 1), max_size=6).map(tuple)
    rows = [(draw(sampling_params(vocab_size)), draw(tokens.filter(len)), draw(tokens)) for _ in range(count)]
    scale = draw(st.sampled_from([0.1, 3.0, 20.0]))
    grid = draw(st.sampled_from([0.0, 0.5]))
    return make_logits(draw(st.integers(0, 2**32)), count, vocab_size, scale, grid), rows


@given(batches())
@settings(max_examples=150)
def test_every_mixture_of_parameters_agrees_with_the_reference(batch: tuple[np.ndarray, list[Row]]) -> None:
    """Rows of any parameters, together in one batch, each get the token a naive float64 sampler chooses."""
    logits, rows = batch
    for row_logits, row, token_id in zip(logits, rows, sample(logits, rows).token_ids, strict=True):
        assert_agrees(row_logits, row, token_id)


@given(batches(), st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_a_row_never_depends_on_its_batch(batch: tuple[np.ndarray, list[Row]], random: object) -> None:
    """The same token comes out alone, among others, in another order and in another permanent row."""
    logits, rows = batch
    together = sample(logits, rows).token_ids
    alone = [sample(logits[i : i + 1], [row], [i + 3]).token_ids[0] for i, row in enumerate(rows)]
    order = list(range(len(rows)))
    random.shuffle(order)  # type: ignore[attr-defined]
    shuffled = sample(logits[order], [rows[i] for i in order]).token_ids
    assert alone == together
    assert shuffled == [together[i] for i in order]


PARAMETERS = [
    SamplingParams(temperature=0.5, seed=1),
    SamplingParams(top_k=3, seed=1),
    SamplingParams(top_k=200, seed=1),
    SamplingParams(top_k=150, top_p=0.5, temperature=3.0, seed=1),
    SamplingParams(top_p=0.6, seed=1),
    SamplingParams(top_p=0.999, seed=1),
    SamplingParams(min_p=0.2, seed=1),
    SamplingParams(top_k=40, top_p=0.9, min_p=0.02, temperature=1.5, seed=1),
    SamplingParams(presence_penalty=2.0, seed=1),
    SamplingParams(frequency_penalty=1.5, seed=1),
    SamplingParams(repetition_penalty=1.8, seed=1),
    SamplingParams(logit_bias={1: 5.0, 4: -100.0}, seed=1),
    SamplingParams(allowed_token_ids=(1, 4, 7), seed=1),
    SamplingParams(bad_words_token_ids=((6, 1), (5,)), seed=1),
]


@pytest.mark.parametrize("params", PARAMETERS)
def test_tokens_are_drawn_with_the_right_frequencies(params: SamplingParams) -> None:
    """Over 4,000 positions each parameter alone gives the reference's distribution by a chi-square test."""
    vocab_size, draws = 260, 4000
    logits = make_logits(5, 1, vocab_size, 1.0)[0]
    logits[:8] += 3
    prompt, output = (1, 1, 5), (4, 4, 4, 6)
    state = SamplingRows(vocab_size, EOS, 1, send)
    state.admit(0, Admission(0, prompt + output, len(prompt), params), params)
    sampler = Sampler(vocab_size, CPU)
    # The same row over and over: only the position counts on.
    batch = state.select(np.zeros(draws, np.intp), np.arange(7, 7 + draws, dtype=np.int64))
    ids = sampler.sample(torch.from_numpy(np.tile(logits, (draws, 1)).astype(np.float32)), batch).token_ids
    expected = reference.probabilities(reference.edited(logits, params, prompt, output, EOS), params) * draws
    observed = np.bincount(ids, minlength=vocab_size)
    assert not observed[expected == 0].any()
    assert chi_square_is_plausible(observed, expected)


def chi_square_is_plausible(observed: np.ndarray, expected: np.ndarray) -> bool:
    """Say whether the counts deviate less than 1 in 1,000 samples would. Bins under 5 are pooled.

    Source of the quantile: Wilson and Hilferty 1931.
    """
    rare = expected < 5
    observed = np.append(observed[~rare], observed[rare].sum())
    expected = np.append(expected[~rare], max(expected[rare].sum(), 1e-9))
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    limit = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3
    return statistic < limit


def test_ties_go_to_the_lowest_id() -> None:
    """Greedy, and top_k = 1, take the first of several equal logits, wherever they stand."""
    logits = np.zeros((3, 200))
    logits[0, [70, 130]] = logits[1, [199, 3]] = logits[2, 128] = 5
    rows: list[Row] = [(GREEDY, (1,), ()), (SamplingParams(top_k=1), (1,), ()), (GREEDY, (1,), ())]
    assert sample(logits, rows).token_ids == [70, 3, 128]
    assert sample(np.zeros((1, 200)), rows[:1]).token_ids == [0]


@pytest.mark.parametrize("params", [GREEDY, *PARAMETERS])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_row_that_is_not_finite_fails_alone(params: SamplingParams, poison: float) -> None:
    """One NaN or infinity anywhere in a row fails that row, whatever it asked for, and no other."""
    logits = make_logits(7, 3, 300)
    row: Row = (params, (1, 5), (4,))
    healthy = sample(logits, [row] * 3).token_ids
    logits[1, 250] = poison
    assert sample(logits, [row] * 3).token_ids == [healthy[0], NOT_FINITE, healthy[2]]
    logits[1, :] = -math.inf
    assert sample(logits, [row] * 3).token_ids == [healthy[0], NOT_FINITE, healthy[2]]


def test_a_row_whose_whole_vocabulary_is_masked_fails_alone() -> None:
    """Masks that leave nothing fail the request that asked for them; logprobs of the others still come."""
    rows: list[Row] = [
        (SamplingParams(temperature=t, allowed_token_ids=(5,), bad_words_token_ids=((5,),), logprobs=1), (1,), ())
        for t in (0, 1)
    ]
    rows.append((SamplingParams(temperature=0, logprobs=1), (1,), ()))
    result = sample(make_logits(1, 3, 100), rows)
    assert result.token_ids[:2] == [NOTHING_LEFT, NOTHING_LEFT]
    assert result.logprobs is not None
    assert result.logprobs[:2] == [None, None]
    assert result.logprobs[2] is not None


def test_a_minus_infinity_among_finite_logits_is_a_mask() -> None:
    """A model may forbid single tokens by -inf."""
    logits = make_logits(1, 2, 100)
    logits[:, :90] = -math.inf
    rows: list[Row] = [(GREEDY, (1,), ()), (SamplingParams(top_p=0.9, seed=2), (1,), ())]
    assert all(token_id >= 90 for token_id in sample(logits, rows).token_ids)


@pytest.mark.parametrize("num", [0, 1, 5, -1, 1000])
def test_logprobs_are_those_of_the_raw_logits(num: int) -> None:
    """Logprob, rank and likeliest tokens ignore temperature, bias and filters; equal tokens stand in id order."""
    logits = make_logits(3, 2, 50, grid=0.5)
    params = SamplingParams(temperature=0.7, top_k=4, logit_bias={7: 100.0}, logprobs=num, seed=4)
    result = sample(logits, [(params, (1,), ()), (GREEDY, (1,), ())])
    assert result.logprobs is not None
    entry, none = result.logprobs
    raw = logits[0] - np.log(np.exp(logits[0]).sum())
    likeliest = sorted(range(50), key=lambda token: (-raw[token], token))[: 50 if num < 0 else num]
    assert none is None
    assert entry is not None
    assert entry.token_id == result.token_ids[0] == 7
    assert entry.logprob == pytest.approx(raw[7], abs=1e-5)
    assert entry.rank == 1 + (raw > raw[7]).sum()
    assert [token for token, _ in entry.top] == likeliest
    assert [logprob for _, logprob in entry.top] == pytest.approx(raw[likeliest], abs=1e-5)


def test_named_tokens_are_told_beside_the_likeliest() -> None:
    """Each row hears of the tokens it names, once, in their place among the likeliest; the others of none."""
    logits = make_logits(5, 3, 50)
    asked = [((40, 2, 9), 3), ((), 1), ((7,), 0)]
    batch = [(SamplingParams(temperature=0, logprobs=num, logprob_token_ids=ids), (1,), ()) for ids, num in asked]
    result = sample(logits, [*batch])
    assert result.logprobs is not None
    for row, (entry, (ids, num)) in enumerate(zip(result.logprobs, asked, strict=True)):
        assert entry is not None
        raw = logits[row] - np.log(np.exp(logits[row]).sum())
        order = sorted(range(50), key=lambda token, raw=raw: -raw[token])
        wanted = [token for token in order if token in {*order[:num], *ids}]
        assert [token for token, _ in entry.top] == wanted
        assert [logprob for _, logprob in entry.top] == pytest.approx(raw[wanted], abs=1e-5)


def test_history_told_twice_counts_once() -> None:
    """A step that is repeated tells the same tokens again; penalties see them once."""
    params = SamplingParams(temperature=0, frequency_penalty=1.0)
    state = SamplingRows(10, EOS, 1, send)
    state.admit(0, Admission(0, (1, 2), 2, params), params)
    for start, tokens in [(0, (1,)), (1, (2,)), (2, (7,)), (2, (7,)), (3, (7,)), (2, (7, 7))]:
        state.set_tokens(0, start, tokens)
    logits = torch.zeros(1, 10)
    batch = state.select(np.zeros(1, np.intp), np.array([4], np.int64))
    assert batch.edits is not None
    batch.edits.apply(logits, forbid)
    assert logits[0].tolist() == [0, 0, 0, 0, 0, 0, 0, -2, 0, 0]


def test_without_a_seed_requests_differ() -> None:
    """Two unseeded requests with the same logits do not roll the same dice."""
    rows: list[Row] = [(SamplingParams(), (1,), ())] * 2
    flat = np.zeros((2, 5000))
    first, second = sample(flat, rows).token_ids
    assert first != second
    assert sample(flat, rows).token_ids != [first, second]
