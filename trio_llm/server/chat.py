"""POST /v1/chat/completions."""

from __future__ import annotations

from typing import Any

import attrs
from quart import Response
from quart_trio import QuartTrio

from trio_llm.engine import Stream
from trio_llm.errors import InvalidRequestError
from trio_llm.messages import ModelInfo, SamplingParams
from trio_llm.server.amounts import check_amounts
from trio_llm.server.answer_grammar import Thinking, answer_grammar
from trio_llm.server.body import read_body
from trio_llm.server.chat_format import ChatFormat
from trio_llm.server.conversation import chat_prompt, flatten
from trio_llm.server.generation import Caller, Head, answer, submit
from trio_llm.server.logprobs import TokenNames
from trio_llm.server.parsing.message import MessageStyle
from trio_llm.server.parsing.reasoning import CLOSE, OPEN
from trio_llm.server.parsing.tools import MARKERS
from trio_llm.server.prompts import bad_word_ids, shown_prompts
from trio_llm.server.requests import ChatBody
from trio_llm.server.sampling import check_max_tokens, sampling_params
from trio_llm.server.services import Services
from trio_llm.server.structured import compile_grammar, output_grammar
from trio_llm.server.thinking_budget import ThinkingBudget
from trio_llm.server.tool_choice import ToolUse, tool_use


def register(app: QuartTrio, services: Services) -> None:
    """Add the endpoint."""

    @app.post("/v1/chat/completions")
    async def create_chat_completion() -> Response | dict[str, Any]:
        return await chat(services, await read_body(ChatBody), Caller.current())


@attrs.frozen
class OpenChat:
    """A conversation that the model is answering, and how its answer is to be read; one stream per choice."""

    streams: list[Stream]
    style: MessageStyle


async def chat(services: Services, body: ChatBody, caller: Caller) -> Response | dict[str, Any]:
    """Answer a checked body."""
    head = Head.make("chatcmpl", services.check_model(body.model), body.request_id)
    opened = await open_chat(services, body, caller)
    names = TokenNames(services.tokenizer, as_ids=body.return_tokens_as_token_ids is True)
    echo = flatten(body.messages[-1], "")["content"] if body.echo else ""
    prompt = await shown_prompts(services, body, [opened.streams[0].prompt_token_ids])
    form = ChatFormat(head, body, opened.streams, names, opened.style, echo, *prompt)
    return await answer(caller, body, opened.streams, form)


async def open_chat(services: Services, body: ChatBody, caller: Caller) -> OpenChat:
    """Have a conversation answered; in which API's words the answer is told is its reader's business."""
    check_amounts(body, services.config.limits)  # One that another API's body became was not counted yet.
    params = sampling_params(
        body,
        info=services.engine.info,
        bad_words=await bad_word_ids(services, body.bad_words),
        max_tokens=_max_tokens(body, services.engine.info),
        logprobs=_num_logprobs(body, services.config.engine.max_logprobs),
        prompt_logprobs=body.prompt_logprobs,
    )
    tools = tool_use(services, body)
    prompt = await chat_prompt(services, body, tools.shown)
    style = MessageStyle(
        thinks=services.thinks,
        thinking_begun=prompt.thinking == "begun",
        tool_form=tools.form,
        parallel=body.parallel_tool_calls is not False,
        show_reasoning=body.include_reasoning is not False,
    )
    params = await _bind(services, body, tools, prompt.thinking, params)
    return OpenChat(await submit(services, caller, body, [prompt.token_ids], params), style)


async def _bind(
    services: Services, body: ChatBody, tools: ToolUse, thinking: Thinking, params: SamplingParams
) -> SamplingParams:
    """Hold the answer to the form that the request asks for, and let the parsers see the markers they need."""
    special_tokens = services.tokenizer.special_tokens
    wanted = output_grammar(body.response_format, body.structured_outputs) if tools.beside else None
    forms = [form for form in (tools.grammar, wanted) if form is not None]
    if (source := answer_grammar(forms, thinking, special_tokens)) is not None:
        params = attrs.evolve(params, grammar=await compile_grammar(services, source))
    params = _limit_thinking(services, body, thinking, params)
    markers = (*(MARKERS[tools.form] if tools.form is not None else ()), *((OPEN, CLOSE) if services.thinks else ()))
    if any(marker in special_tokens for marker in markers):
        params = attrs.evolve(params, skip_special_tokens=False)
    return params


def _limit_thinking(services: Services, body: ChatBody, thinking: Thinking, params: SamplingParams) -> SamplingParams:
    """End thinking when the request's budget for it is spent."""
    if (budget := body.thinking_token_budget) is None:
        return params
    open_id, close_id = services.thinking_markers
    if not services.thinks or close_id is None:
        why = "this model does not think" if not services.thinks else "this model's thinking ends with no single token"
        raise InvalidRequestError(f"thinking_token_budget = {budget}: {why}.", param="thinking_token_budget")
    if thinking == "none":
        return params
    grammar = ThinkingBudget(budget, open_id, close_id, begun=thinking == "begun", inner=params.grammar)
    return attrs.evolve(params, grammar=grammar)


def _max_tokens(body: ChatBody, info: ModelInfo) -> int | None:
    """Return the limit; without one an answer may take what is left of the context."""
    if body.max_completion_tokens is not None:
        return check_max_tokens("max_completion_tokens", body.max_completion_tokens, info)
    if body.max_tokens == 0:
        raise InvalidRequestError("max_tokens = 0 is not allowed: at least 1.", param="max_tokens")
    return check_max_tokens("max_tokens", body.max_tokens, info)


def _num_logprobs(body: ChatBody, most: int) -> int | None:
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequestError("top_logprobs needs `logprobs=True`.", param="top_logprobs")
    if body.top_logprobs is not None and most >= 0 and not 0 <= body.top_logprobs <= most:
        raise InvalidRequestError(
            f"top_logprobs = {body.top_logprobs} is not allowed: 0 to {most}.", param="top_logprobs"
        )
    return (body.top_logprobs or 0) if body.logprobs else None
