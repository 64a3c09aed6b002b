"""The sampler over vocabularies and answers of real size, against the reference in float64."""

from __future__ import annotations

import itertools
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.model_runner import reference
from tests.model_runner.test_sampler import CPU, EOS, Row, assert_agrees, make_logits, sample, sampling_params, send
from trio_llm.messages import Admission
from trio_llm.model.ops import cpu as ops_cpu
from trio_llm.model.ops.dispatch import Dispatch, dispatching
from trio_llm.model.sampling.row_params import SamplingRows
from trio_llm.model.sampling.sampler import Sampler
from trio_llm.params import SamplingParams

VOCABULARIES = (49_152, 128_256, 151_936)


def test_the_noise_of_all_tokens_is_the_noise_of_each() -> None:
    """The reference's array of noise holds what it computes token by token."""
    for seed, position in ((0, 0), (-5, 3), (2**63 - 1, 100_000)):
        noise = reference.exponentials(seed, position, 151_936)
        for token in (0, 1, 63, 64, 5000, 151_935):
            assert noise[token] == pytest.approx(reference.exponential(seed, position, token), rel=1e-12)


@pytest.mark.parametrize("grid", [0.0, 0.5], ids=["all different", "many equal"])
@pytest.mark.parametrize("vocab_size", [7, 1000, *VOCABULARIES])
def test_native_draws_choose_the_very_tokens_of_torch(vocab_size: int, grid: float) -> None:
    """Rows of any temperature and filter, alone and beside greedy and failing ones."""
    ops_cpu.prepare()
    logits = make_logits(vocab_size, 12, vocab_size, grid=grid)
    logits[3, : vocab_size // 2] = -np.inf
    logits[4] = 1.0
    plain: list[Row] = [
        (SamplingParams(temperature=temperature, seed=seed), (1, 2), (3,))
        for seed, temperature in enumerate((0.01, 0.2, 0.7, 1.0, 1.0, 2.0))
    ]
    mixed: list[Row] = [(SamplingParams(temperature=0), (1,), ()), (SamplingParams(seed=9, top_k=3), (1,), ()), *plain]
    filters: tuple[dict[str, Any], ...] = (
        {"top_p": 0.95},
        {"top_p": 0.8, "top_k": 20},
        {"min_p": 0.05},
        {"top_k": 200},
    )
    filtered: list[Row] = [
        (SamplingParams(temperature=temperature, seed=7, **some), (1, 2), (3,))
        for some, temperature in itertools.product(filters, (0.6, 1.0, 1.5))
    ]
    broken = logits.copy()
    broken[2], broken[5, 1] = -np.inf, np.nan
    for values, rows in (
        (logits, plain * 2),
        (logits, filtered),
        (logits[:8], mixed),
        (broken[:8], mixed),
        (logits[:1], plain[2:3]),
    ):
        expected = sample(values, rows)
        with dispatching(Dispatch("native", ops_cpu, "cpu")) as dispatch:
            assert sample(values, rows) == expected
        assert dispatch.calls == {("draw", "native", ""): 1}


@pytest.mark.parametrize("vocab_size", [7, *VOCABULARIES])
def test_native_masks_and_logprobs_are_those_of_torch(vocab_size: int) -> None:
    """Rows with allowed tokens, beside rows without; the same tokens, and log-probabilities within rounding."""
    ops_cpu.prepare()
    logits = make_logits(3, 4, vocab_size, grid=0.0)
    some = tuple(range(0, vocab_size, 3))
    rows: list[Row] = [
        (SamplingParams(temperature=1, seed=4, allowed_token_ids=some, logprobs=5), (1,), ()),
        (SamplingParams(temperature=0, allowed_token_ids=(2, 5)), (1,), ()),
        (SamplingParams(temperature=0.8, seed=5, top_p=0.9, logprobs=0), (1,), ()),
        (SamplingParams(temperature=0, logprobs=2, logprob_token_ids=(0, 3)), (1,), ()),
    ]
    expected = sample(logits, rows)
    with dispatching(Dispatch("native", ops_cpu, "cpu")) as dispatch:
        got = sample(logits, rows)
    assert dispatch.calls == {(op, "native", ""): 1 for op in ("draw", "mask", "logprobs")}
    assert got.token_ids == expected.token_ids
    assert got.logprobs is not None
    assert expected.logprobs is not None
    for entry, other in zip(got.logprobs, expected.logprobs, strict=True):
        assert (entry is None) == (other is None)
        if entry is not None and other is not None:
            assert [token for token, _ in entry.top] == [token for token, _ in other.top]
            assert entry.logprob == pytest.approx(other.logprob, abs=3e-5)
            assert [value for _, value in entry.top] == pytest.approx([value for _, value in other.top], abs=3e-5)


def answer_of(seed: int, length: int, vocab_size: int) -> tuple[int, ...]:
    """Return tokens as a text has them: few are frequent, most occur once."""
    ranks = np.random.default_rng(seed).zipf(1.3, size=length)
    return tuple((ranks * 2_654_435_761 % vocab_size).tolist())


@st.composite
def companies(draw: st.DrawFn) -> tuple[np.ndarray, list[Row]]:
    """Sixteen rows of any parameters, whose answers have up to 500 tokens."""
    vocab_size = draw(st.sampled_from(VOCABULARIES))
    seed = draw(st.integers(0, 2**32))
    rows: list[Row] = []
    for at in range(16):
        params = draw(sampling_params(vocab_size))
        prompt = answer_of(seed + at, draw(st.integers(1, 2000)), vocab_size)
        output = answer_of(seed + at + 100, draw(st.sampled_from([0, 1, 63, 64, 65, 255, 499, 500])), vocab_size)
        if at % 4 == 0 and output:  # words that the answer is about to complete
            params = attrs.evolve(params, bad_words_token_ids=((*output[-2:], 7), (output[-1], 11), (9,)))
        rows.append((params, prompt, output))
    return make_logits(seed, 16, vocab_size, draw(st.sampled_from([0.5, 3.0]))), rows


@pytest.mark.slow
@given(companies())
@settings(max_examples=12)
def test_any_parameters_over_long_answers_agree_with_the_reference(company: tuple[np.ndarray, list[Row]]) -> None:
    """Alone and among sixteen, each row gets the token that the reference chooses."""
    logits, rows = company
    together = sample(logits, rows).token_ids
    for at, (row, token_id) in enumerate(zip(rows, together, strict=True)):
        assert_agrees(logits[at], row, token_id)
        if at % 5 == 0:
            assert sample(logits[at : at + 1], [row]).token_ids == [token_id]


PENALISED = [
    SamplingParams(seed=1, frequency_penalty=0.7),
    SamplingParams(seed=2, presence_penalty=1.5, top_p=0.9),
    SamplingParams(seed=3, repetition_penalty=1.3, top_k=40, min_p=0.05),
    SamplingParams(temperature=0, repetition_penalty=1.2, frequency_penalty=0.2, logit_bias={5: 3.0, 900: -100.0}),
    SamplingParams(seed=4, temperature=0.7, top_p=0.95, bad_words_token_ids=((3,), (4, 5)), min_tokens=300),
    SamplingParams(seed=5, temperature=1.5, top_k=2000, top_p=0.8, stop_token_ids=(77,), min_tokens=10),
]


@pytest.mark.parametrize("params", PENALISED)
def test_an_answer_of_500_tokens_is_told_one_by_one(params: SamplingParams) -> None:
    """A row that learns its answer as it is sampled stands where the reference does, with drafts taken back between."""
    vocab_size, prompt = 32_000, answer_of(9, 300, 32_000)
    state = SamplingRows(vocab_size, EOS, 1, send)
    state.admit(0, Admission(0, prompt, len(prompt), params), params)
    sampler, output = Sampler(vocab_size, CPU), []
    for step in range(500):
        logits = make_logits(step, 1, vocab_size, 2.0).astype(np.float32)
        position = len(prompt) + len(output)
        drafts = [[1, 2, 3]] if step % 3 == 0 else None
        batch = state.select(np.zeros(1, np.intp), np.array([position]), drafts)
        rows = 1 if drafts is None else 4
        token_id = int(sampler.sample(torch.from_numpy(np.repeat(logits, rows, 0)), batch).token_ids[0])
        if step % 25 == 24 or step in {63, 64, 65}:
            assert_agrees(logits[0], (params, prompt, tuple(output)), token_id)
        output.append(token_id)
        if 0 in state.history_rows:
            state.set_tokens(0, position, [token_id])
