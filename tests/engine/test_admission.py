from __future__ import annotations

import math
from typing import Any

import pytest

from trio_llm.engine.admission import RequestLimits, check_pooling, resolve
from trio_llm.errors import InvalidRequestError
from trio_llm.params import PoolingParams, SamplingParams, Submission

LIMITS = RequestLimits(max_model_len=32, vocab_size=64, hidden_size=8, max_logprobs=20)

WRONG: list[tuple[str, Any]] = [
    *(("temperature", value) for value in (-0.1, math.nan, math.inf)),
    *(("top_p", value) for value in (0, -1, 1.1, math.nan)),
    *(("min_p", value) for value in (-0.1, 1.1, math.nan)),
    *(("presence_penalty", value) for value in (-2.1, 2.1, math.nan)),
    *(("frequency_penalty", value) for value in (-2.1, 2.1, math.nan)),
    *(("repetition_penalty", value) for value in (0, -1, math.inf, math.nan)),
    ("top_k", -2),
    ("n", 0),
    ("max_tokens", -1),
    *(("min_tokens", value) for value in (-1, 17)),
    *(("seed", value) for value in (2**63, -(2**63) - 1)),
    ("stop", ("a", "")),
    *(("logprobs", value) for value in (-2, 21, -1)),
    *(("prompt_logprobs", value) for value in (-2, 21)),
    *(("stop_token_ids", value) for value in ((64,), (-1,))),
    *(("logit_bias", value) for value in ({64: 1}, {-1: 1}, {0: 101}, {0: math.nan})),
    *(("allowed_token_ids", value) for value in ((), (64,))),
    *(("bad_words_token_ids", value) for value in (((),), ((64,),))),
]


def _resolved(params: SamplingParams, prompt: list[int]) -> SamplingParams:
    final = resolve(Submission(prompt, params), LIMITS).params
    assert isinstance(final, SamplingParams)
    return final


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_value_out_of_range_is_named(name: str, value: object) -> None:
    """What would fail later, or reach the sampler as NaN, is refused at once by the parameter's name."""
    with pytest.raises(InvalidRequestError) as caught:
        _resolved(SamplingParams(**{name: value}), [1])  # type: ignore[arg-type]
    assert caught.value.param is not None
    assert caught.value.param.split("[")[0] in name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0),
        ("temperature", 100),
        ("top_p", 1),
        ("top_k", -1),
        ("seed", -(2**63)),
        ("max_tokens", 0),
        ("logprobs", 20),
        ("logit_bias", {63: -100}),
        ("presence_penalty", -2),
        ("repetition_penalty", 1e-9),
    ],
)
def test_the_ends_of_the_ranges_are_fine(name: str, value: object) -> None:
    """Every bound itself is allowed."""
    assert getattr(_resolved(SamplingParams(**{name: value}), [1]), name) in (value, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prompt", "code"),
    [
        ([], None),
        ([64], None),
        ([-1], None),
        ([1] * 32, "context_length_exceeded"),
        ([1] * 99, "context_length_exceeded"),
    ],
)
def test_a_prompt_that_can_never_be_served(prompt: list[int], code: str | None) -> None:
    """Empty, out of the vocabulary, or without room for one token of output: refused before admission."""
    with pytest.raises(InvalidRequestError) as caught:
        _resolved(SamplingParams(), prompt)
    assert (caught.value.param, caught.value.code) == ("prompt", code)


def test_parameters_become_final() -> None:
    """max_tokens is resolved and clamped to the context, min_tokens to it, and a seed is drawn."""
    final = _resolved(SamplingParams(max_tokens=None), [1] * 30)
    assert final.max_tokens == 2
    assert final.seed is not None
    final = _resolved(SamplingParams(max_tokens=99, min_tokens=50, seed=-5), [1] * 30)
    assert (final.max_tokens, final.min_tokens, final.seed) == (2, 2, -5)


def test_an_embedding_may_fill_the_context() -> None:
    """A prompt of the whole context can be embedded, one token more cannot; dimensions end at the model's width."""
    check_pooling(Submission([1] * 32, PoolingParams(dimensions=8)), LIMITS)
    with pytest.raises(InvalidRequestError, match="33 tokens"):
        check_pooling(Submission([1] * 33, PoolingParams()), LIMITS)
    with pytest.raises(InvalidRequestError, match="dimensions"):
        check_pooling(Submission([1], PoolingParams(dimensions=9)), LIMITS)
