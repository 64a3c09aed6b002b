"""The sampler by its kernels, simulated: the tokens and log-probabilities of the torch reference."""

from __future__ import annotations

from collections.abc import Generator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cuda_kernels import sample as kernels
from cuda_kernels.launch import using
from tests.kernels.helpers import sharing_rows
from tests.model_runner.test_sampler import GREEDY, Row, batches, make_logits, sample
from tools.ptx_simulator import SimulatedLauncher
from trio_llm.model.ops import cuda as ops_cuda
from trio_llm.model.ops.dispatch import Dispatch, dispatching
from trio_llm.model.sampling import sampler
from trio_llm.model.sampling.sampler import NOT_FINITE, NOTHING_LEFT
from trio_llm.params import SamplingParams


@pytest.fixture
def on_kernels() -> Generator[Dispatch]:
    """Run the CUDA kernels on CPU tensors inside `dispatching`, simulated."""
    with using(SimulatedLauncher()):
        yield Dispatch("cuda", ops_cuda, "cpu")


def test_failures_have_one_name() -> None:
    """Kernel and host mean the same by what stands in place of a token."""
    assert (kernels.NOT_FINITE, kernels.NOTHING_LEFT) == (NOT_FINITE, NOTHING_LEFT) and len(sampler.FAILURES) == 2


@given(batch=batches(), blocks=st.integers(1, 4))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_mixture_gives_the_tokens_of_the_reference(
    batch: tuple[np.ndarray, list[Row]], blocks: int, on_kernels: Dispatch
) -> None:
    """Masks, bad words, bias, penalties, filters and seeds in one batch, rows shared or not: the same tokens."""
    logits, rows = batch
    expected = sample(logits, rows).token_ids
    with dispatching(on_kernels), sharing_rows(blocks):
        assert sample(logits, rows).token_ids == expected


@pytest.mark.parametrize("blocks", [1, 3])
def test_rows_fail_alone_and_for_the_same_reasons(blocks: int, on_kernels: Dispatch) -> None:
    """NaN that a mask would hide, nothing but -inf before the edits, and nothing left by them are told apart."""
    logits = make_logits(7, 5, 300)
    logits[1, 250], logits[2, :] = np.nan, -np.inf
    masked = SamplingParams(allowed_token_ids=(5,), bad_words_token_ids=((6,),), repetition_penalty=1.5, seed=3)
    nothing = SamplingParams(allowed_token_ids=(5,), bad_words_token_ids=((5,),), seed=3)
    rows: list[Row] = [(params, (1, 5), (4,)) for params in (masked, masked, masked, nothing, GREEDY)]
    with dispatching(on_kernels), sharing_rows(blocks):
        token_ids = sample(logits, rows).token_ids
    assert token_ids == [5, NOT_FINITE, NOT_FINITE, NOTHING_LEFT, sample(logits[4:], rows[4:]).token_ids[0]]


@pytest.mark.parametrize(("num", "blocks"), [(0, 1), (0, 3), (3, 1)])
def test_logprobs_are_of_the_raw_logits(num: int, blocks: int, on_kernels: Dispatch) -> None:
    """Value and rank are the reference's, before the bias; the kernel does it where no other token is named."""
    logits = make_logits(3, 3, 200)
    biased = SamplingParams(logit_bias={7: 100.0}, logprobs=num, seed=4)
    rows: list[Row] = [(GREEDY, (1,), ()), (biased, (1,), ()), (biased, (1,), ())]
    expected = sample(logits, rows)
    with dispatching(on_kernels), sharing_rows(blocks):
        got = sample(logits, rows)
    assert got.token_ids == expected.token_ids and got.logprobs and expected.logprobs
    for mine, theirs in zip(got.logprobs, expected.logprobs, strict=True):
        if theirs is None:
            assert mine is None
            continue
        assert mine and (mine.token_id, mine.rank, mine.top) == (7, theirs.rank, theirs.top)
        assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-5)
    assert on_kernels.calls["sample", "cuda", ""] == 1
    assert on_kernels.calls["token_logprobs", "cuda", ""] == (num == 0)
