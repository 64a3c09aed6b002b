"""Answers of the render endpoints, in the form of vLLM's GenerateRequest."""

from __future__ import annotations

from trio_llm.server.answers.base import Answer


class RenderedParams(Answer, kw_only=True):
    """How tokens would be chosen, with the model's defaults and what the context has left.

    Attributes:
        n: Number of answers.
        presence_penalty: Subtracted from the logits of tokens in the output.
        frequency_penalty: The same, for each time that they occur.
        repetition_penalty: Divides or multiplies the logits of tokens in prompt or output.
        temperature: 0 is greedy.
        top_p: Fraction of the probability that is kept.
        top_k: Number of tokens that are kept; 0 keeps all.
        min_p: Least probability that is kept, of that of the likeliest token.
        seed: As requested.
        stop: Strings that end the answer.
        stop_token_ids: Tokens that end the answer.
        bad_words: As requested.
        ignore_eos: Whether the end token does not end the answer.
        max_tokens: Maximum of output tokens.
        min_tokens: Number of tokens before which nothing ends the answer.
        logprobs: Number of log-probabilities per token; null for none.
        prompt_logprobs: The same for the prompt.
        skip_special_tokens: Whether control tokens are left out of the text.
        include_stop_str_in_output: Whether the stop string is part of the text.
        logit_bias: Token id -> added to its logit.
        allowed_token_ids: The only tokens that may be sampled; null for all.
    """

    n: int
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int | None
    stop: list[str]
    stop_token_ids: list[int]
    bad_words: list[str]
    ignore_eos: bool
    max_tokens: int | None
    min_tokens: int
    logprobs: int | None
    prompt_logprobs: int | None
    skip_special_tokens: bool
    include_stop_str_in_output: bool
    logit_bias: dict[str, float] | None
    allowed_token_ids: list[int] | None


class RenderedStreamOptions(Answer, kw_only=True):
    """What else a stream would report.

    Attributes:
        include_usage: Usage at the end.
        continuous_usage_stats: Usage in every chunk.
    """

    include_usage: bool
    continuous_usage_stats: bool


class RenderedRequest(Answer, kw_only=True):
    """A prompt and its parameters, ready for the engine.

    Attributes:
        request_id: New for each request, or the request's `request_id` with its prefix.
        token_ids: The prompt.
        features: Of images and audio; always null.
        sampling_params: How tokens would be chosen.
        model: Served name of the model.
        stream: As requested.
        stream_options: As requested.
        cache_salt: As requested.
        priority: Lower is served first.
        kv_transfer_params: Always null.
    """

    request_id: str
    token_ids: list[int]
    features: None = None
    sampling_params: RenderedParams
    model: str
    stream: bool
    stream_options: RenderedStreamOptions | None
    cache_salt: str | None
    priority: int
    kv_transfer_params: None = None
