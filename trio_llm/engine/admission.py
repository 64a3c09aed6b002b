"""Checks a request before it is submitted: whatever could fail later fails here, by name."""

from __future__ import annotations

import math
import secrets
from collections.abc import Collection

import attrs

from trio_llm.errors import InvalidRequestError
from trio_llm.params import PoolingParams, SamplingParams, Submission, check_prompt_length


@attrs.frozen(kw_only=True)
class RequestLimits:
    """The limits that the model and the settings put on a request.

    Attributes:
        max_model_len: Maximum prompt plus output in tokens; a sequence of this length fits the KV cache.
        max_logprobs: Maximum logprobs per position.
    """

    max_model_len: int
    vocab_size: int
    hidden_size: int
    max_logprobs: int


def resolve(submission: Submission, limits: RequestLimits) -> Submission:
    """Check a request; return it with a seed and a final `max_tokens`.

    Raises:
        InvalidRequestError: Names the parameter, the value and what is allowed.
    """
    params, prompt = submission.params, submission.prompt_token_ids
    assert isinstance(params, SamplingParams)
    check_prompt_length(len(prompt), limits.max_model_len, generates=True)
    _check_ids("prompt", prompt, limits)
    _check_sampling(params)
    _check_logprobs(params, limits)
    _check_tokens(params, limits)
    remaining = limits.max_model_len - len(prompt)
    max_tokens = remaining if params.max_tokens is None else min(params.max_tokens, remaining)
    final = attrs.evolve(
        params,
        # A request for its prompt's logprobs only still samples one token, to end with.
        max_tokens=max(max_tokens, 1),
        min_tokens=min(params.min_tokens, max_tokens),
        seed=secrets.randbits(63) if params.seed is None else params.seed,
    )
    return attrs.evolve(submission, params=final)


def check_pooling(submission: Submission, limits: RequestLimits) -> None:
    """Check an embedding request. Raises InvalidRequestError if it can never be served."""
    params, prompt = submission.params, submission.prompt_token_ids
    assert isinstance(params, PoolingParams)
    check_prompt_length(len(prompt), limits.max_model_len, generates=False)
    _check_ids("prompt", prompt, limits)
    if params.dimensions is not None and not 1 <= params.dimensions <= limits.hidden_size:
        _refuse("dimensions", params.dimensions, f"1 to {limits.hidden_size}")


def _check_sampling(params: SamplingParams) -> None:
    _check_range("temperature", params.temperature, 0, math.inf)
    _check_range("top_p", params.top_p, 0, 1, open_below=True)
    _check_range("min_p", params.min_p, 0, 1)
    _check_range("presence_penalty", params.presence_penalty, -2, 2)
    _check_range("frequency_penalty", params.frequency_penalty, -2, 2)
    _check_range("repetition_penalty", params.repetition_penalty, 0, math.inf, open_below=True)
    _check_range("top_k", params.top_k, -1, math.inf)
    _check_range("n", params.n, 1, math.inf)
    if params.max_tokens is not None:
        _check_range("max_tokens", params.max_tokens, 0, math.inf)
    _check_range("min_tokens", params.min_tokens, 0, math.inf if params.max_tokens is None else params.max_tokens)
    if params.seed is not None and not -(2**63) <= params.seed < 2**63:
        _refuse("seed", params.seed, "a 64-bit signed integer")
    if "" in params.stop:
        _refuse("stop", params.stop, "strings that are not empty")
    if params.structured_outputs is not None:
        _refuse("structured_outputs", params.structured_outputs, "a compiled `grammar`, which LLM makes of it")
    if params.grammar is not None:
        # Only the grammar says where the output is complete; then only the end may follow.
        if params.min_tokens:
            _refuse("min_tokens", params.min_tokens, "0 with a grammar")
        if params.ignore_eos:
            _refuse("ignore_eos", params.ignore_eos, "false with a grammar")


def _check_logprobs(params: SamplingParams, limits: RequestLimits) -> None:
    for name, value in (("logprobs", params.logprobs), ("prompt_logprobs", params.prompt_logprobs)):
        count = limits.vocab_size if value == -1 else value
        if count is not None and not 0 <= count <= limits.max_logprobs:
            _refuse(name, value, f"0 to {limits.max_logprobs} (--max-logprobs)")
    if params.logprob_token_ids and params.logprobs is None:
        _refuse("logprob_token_ids", params.logprob_token_ids, "only with logprobs")
    _check_ids("logprob_token_ids", params.logprob_token_ids, limits)


def _check_tokens(params: SamplingParams, limits: RequestLimits) -> None:
    _check_ids("stop_token_ids", params.stop_token_ids, limits)
    _check_ids("logit_bias", params.logit_bias, limits)
    for token_id, bias in params.logit_bias.items():
        _check_range(f"logit_bias[{token_id}]", bias, -100, 100)
    if params.allowed_token_ids is not None:
        if not params.allowed_token_ids:
            _refuse("allowed_token_ids", params.allowed_token_ids, "at least one token id")
        _check_ids("allowed_token_ids", params.allowed_token_ids, limits)
    for word in params.bad_words_token_ids:
        if not word:
            _refuse("bad_words", word, "words of at least one token")
        _check_ids("bad_words", word, limits)


def _check_ids(name: str, token_ids: Collection[int], limits: RequestLimits) -> None:
    for token_id in (min(token_ids), max(token_ids)) if token_ids else ():
        if not 0 <= token_id < limits.vocab_size:
            _refuse(name, token_id, f"token ids from 0 to {limits.vocab_size - 1}")


def _check_range(name: str, value: float, low: float, high: float, *, open_below: bool = False) -> None:
    inside = (low < value if open_below else low <= value) and value <= high and value != math.inf
    if not inside:
        upper = "" if high == math.inf else f" and at most {high}"
        _refuse(name, value, f"{'more than' if open_below else 'at least'} {low}{upper}")


def _refuse(name: str, value: object, allowed: str) -> None:
    raise InvalidRequestError(f"{name} = {value!r} is not allowed: {allowed}.", param=name)
