"""From the fields of a request to the engine's SamplingParams; the engine checks their ranges."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from trio_llm.errors import InvalidRequestError
from trio_llm.model_info import ModelInfo
from trio_llm.params import RepetitionDetection, SamplingParams
from trio_llm.server.bodies import types as requests
from trio_llm.server.bodies.types import GenerationBody

_GREEDY_BELOW = 1e-5
_MIN_TEMPERATURE = 0.01
_NAMED = ("presence_penalty", "frequency_penalty", "seed", "min_tokens", "ignore_eos", "include_stop_str_in_output")
_DEFAULTED = ("top_p", "top_k", "min_p", "repetition_penalty")


def sampling_params(
    body: GenerationBody,
    *,
    info: ModelInfo,
    bad_words: tuple[tuple[int, ...], ...],
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> SamplingParams:
    """Build the parameters: from the request, else the model's generation_config, else neutral.

    Raises:
        InvalidRequestError: Names the field, its value and what is allowed.
    """
    _check_together(body, max_tokens, logprobs)
    given: dict[str, Any] = {name: getattr(body, name) for name in _NAMED if getattr(body, name) is not None}
    for name in _DEFAULTED:
        value = getattr(body, name)
        if value is None:
            value = info.default_sampling.get(name)
        if value is not None:
            given[name] = value
    return SamplingParams(
        **given,
        n=body.n or 1,
        temperature=_temperature(body, info.default_sampling),
        max_tokens=max_tokens,
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        skip_special_tokens=body.skip_special_tokens is not False,
        logit_bias=_logit_bias(body.logit_bias or {}),
        allowed_token_ids=tuple(body.allowed_token_ids) if body.allowed_token_ids is not None else None,
        bad_words_token_ids=bad_words,
        logprobs=logprobs,
        logprob_token_ids=tuple(dict.fromkeys(body.logprob_token_ids or ())),
        prompt_logprobs=prompt_logprobs,
        repetition_detection=_repetition(body.repetition_detection),
    )


def _check_together(body: GenerationBody, max_tokens: int | None, logprobs: int | None) -> None:
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise InvalidRequestError(f"best_of = {body.best_of} is not supported: it must equal n.", param="best_of")
    if body.min_tokens is not None and max_tokens is not None and body.min_tokens > max_tokens:
        raise InvalidRequestError(
            f"min_tokens = {body.min_tokens} is not allowed: at most max_tokens, {max_tokens}.", param="min_tokens"
        )
    if body.stream_options is not None and not body.stream:
        raise InvalidRequestError("stream_options needs `stream=True`.", param="stream_options")
    if body.stream_interval not in (None, 1) and not body.stream:
        raise InvalidRequestError("stream_interval needs `stream=True`.", param="stream_interval")
    if body.return_progress and not body.stream:
        raise InvalidRequestError("return_progress needs `stream=True`.", param="return_progress")
    if body.logprob_token_ids and logprobs is None:
        raise InvalidRequestError("logprob_token_ids needs logprobs.", param="logprob_token_ids")
    if body.prompt_logprobs is not None and body.stream:
        raise InvalidRequestError("prompt_logprobs are not available when `stream=True`.", param="prompt_logprobs")


def _temperature(body: GenerationBody, defaults: Mapping[str, float | int]) -> float:
    value = body.temperature if body.temperature is not None else float(defaults.get("temperature", 1.0))
    # Between the two, logits overflow half precision; vLLM uses the same minimum.
    return 0.0 if value < _GREEDY_BELOW else max(value, _MIN_TEMPERATURE)


def _repetition(detection: requests.RepetitionDetection | None) -> RepetitionDetection | None:
    if detection is None:
        return None
    least = max(detection.min_pattern_size or 0, 1)
    if least > detection.max_pattern_size:
        where = "repetition_detection.min_pattern_size"
        raise InvalidRequestError(
            f"{where} = {least} is not allowed: at most max_pattern_size, {detection.max_pattern_size}.", param=where
        )
    return RepetitionDetection(
        max_pattern_size=detection.max_pattern_size, min_count=detection.min_count, min_pattern_size=least
    )


def _logit_bias(biases: Mapping[str, float]) -> dict[int, float]:
    for key in biases:
        # One spelling for each id: of "7" and "07", one would be lost.
        if not re.fullmatch(r"0|[1-9][0-9]{0,9}", key):
            raise InvalidRequestError(f"logit_bias: {key[:64]!r} is not a token id.", param="logit_bias")
    return {int(key): bias for key, bias in biases.items()}
