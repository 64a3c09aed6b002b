"""POST /v1/completions/render and /v1/chat/completions/render: what a request would be answered from.

Bodies are those of the endpoints, and are checked alike; the engine gets nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from quart import Response
from quart_trio import QuartTrio

from trio_llm.params import PoolingParams, SamplingParams
from trio_llm.server.answers.rendered import RenderedParams, RenderedRequest, RenderedStreamOptions
from trio_llm.server.bodies.request_body import read_body
from trio_llm.server.bodies.types import ChatBody, CompletionBody, GenerationBody
from trio_llm.server.generation.chat_prompt import warn_of_effort
from trio_llm.server.generation.prompts import run
from trio_llm.server.generation.respond import Caller, Head, submissions_of
from trio_llm.server.http.json_response import json_response
from trio_llm.server.openai.chat import read_chat
from trio_llm.server.openai.completions import prepare_completion
from trio_llm.server.services import Services


def register(app: QuartTrio, services: Services) -> None:
    """Add the endpoints."""

    @app.post("/v1/completions/render")
    async def render_completion() -> Response:
        body, caller = await read_body(CompletionBody), Caller.current()
        model = services.check_model(body.model)
        prompts, params = await prepare_completion(services, body)
        rendered = _rendered(services, caller, body, prompts, params, "cmpl", model)

        def answer() -> Response:
            return json_response(rendered)

        return await run(services, answer, chars=sum(map(len, prompts)))  # The JSON can be megabytes.

    @app.post("/v1/chat/completions/render")
    async def render_chat_completion() -> Response:
        body, caller = await read_body(ChatBody), Caller.current()
        model = services.check_model(body.model)
        warn_of_effort(services, caller, "reasoning_effort", body.reasoning_effort)
        chat = await read_chat(services, body, caller)
        (rendered,) = _rendered(services, caller, body, [chat.prompt_token_ids], chat.params, "chatcmpl", model)

        def answer() -> Response:
            return json_response(rendered)

        return await run(services, answer, chars=len(chat.prompt_token_ids))


def _rendered(
    services: Services,
    caller: Caller,
    body: GenerationBody,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    prefix: str,
    model: str,
) -> list[RenderedRequest]:
    streamed = body.stream is True
    options = body.stream_options
    return [
        RenderedRequest(
            request_id=Head.make(prefix, model, body.request_id).id,
            token_ids=list(submission.prompt_token_ids),
            sampling_params=_rendered_params(body, submission.params),
            model=model,
            stream=streamed,
            stream_options=None
            if options is None
            else RenderedStreamOptions(
                include_usage=options.include_usage is True,
                continuous_usage_stats=options.continuous_usage_stats is True,
            ),
            cache_salt=body.cache_salt,
            priority=submission.priority,
        )
        for submission in services.resolve(submissions_of(services, caller, body, prompts, params))
    ]


def _rendered_params(body: GenerationBody, params: SamplingParams | PoolingParams) -> RenderedParams:
    assert isinstance(params, SamplingParams)
    return RenderedParams(
        n=params.n,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        seed=body.seed,
        stop=list(params.stop),
        stop_token_ids=list(params.stop_token_ids),
        bad_words=list(body.bad_words or ()),
        ignore_eos=params.ignore_eos,
        max_tokens=params.max_tokens,
        min_tokens=params.min_tokens,
        logprobs=params.logprobs,
        prompt_logprobs=params.prompt_logprobs,
        skip_special_tokens=params.skip_special_tokens,
        include_stop_str_in_output=params.include_stop_str_in_output,
        logit_bias={str(token_id): bias for token_id, bias in params.logit_bias.items()} or None,
        allowed_token_ids=None if params.allowed_token_ids is None else list(params.allowed_token_ids),
    )
