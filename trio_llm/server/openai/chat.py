"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import trio
from quart import Response
from quart_trio import QuartTrio

from trio_llm.engine import Stream
from trio_llm.errors import InvalidRequestError
from trio_llm.model_info import ModelInfo
from trio_llm.params import SamplingParams, check_max_tokens
from trio_llm.server.bodies.request_body import read_body
from trio_llm.server.bodies.size_limits import check_amounts
from trio_llm.server.bodies.types import ChatBody
from trio_llm.server.constraints.answer_grammar import Thinking, answer_grammar
from trio_llm.server.constraints.custom_tools import unheld_tools
from trio_llm.server.constraints.response_format import asks_for_form, compile_grammar, requested_form
from trio_llm.server.constraints.thinking_budget import ThinkingBudget
from trio_llm.server.constraints.tool_choice import ToolUse, tool_use
from trio_llm.server.generation.chat_prompt import chat_prompt, warn_of_effort, warn_of_unreadable
from trio_llm.server.generation.history import text_of
from trio_llm.server.generation.prompts import bad_word_ids, reported_prompts
from trio_llm.server.generation.respond import Caller, Head, answer, submit
from trio_llm.server.generation.sampling_params import sampling_params
from trio_llm.server.openai.chat_format import ChatFormat
from trio_llm.server.openai.logprobs import TokenNames
from trio_llm.server.parsing.custom_inputs import CustomTools
from trio_llm.server.parsing.message import MessageStyle
from trio_llm.server.parsing.reasoning import THINK
from trio_llm.server.parsing.response_parser import ResponseStyle
from trio_llm.server.parsing.tools import MARKERS
from trio_llm.server.services import Services


def register(app: QuartTrio, services: Services) -> None:
    """Add the endpoint."""

    @app.before_serving
    async def prepare() -> None:
        if services.template is not None:
            app.nursery.start_soon(trio.to_thread.run_sync, services.tokenizer.prepare)

    @app.post("/v1/chat/completions")
    async def create_chat_completion() -> Response:
        return await chat(services, await read_body(ChatBody), Caller.current())


@attrs.frozen
class OpenChat:
    """A conversation that the model is answering; one stream per choice.

    Attributes:
        params: Of the answer.
        style: How to parse the answer.
    """

    streams: list[Stream]
    params: SamplingParams
    style: MessageStyle


async def chat(services: Services, body: ChatBody, caller: Caller) -> Any:
    """Answer a checked body, by a response or as the caller encodes answers."""
    head = Head.make("chatcmpl", services.check_model(body.model), body.request_id)
    warn_of_effort(services, caller, "reasoning_effort", body.reasoning_effort)
    opened = await open_chat(services, body, caller, head.id)
    names = TokenNames(services.tokenizer, as_ids=body.return_tokens_as_token_ids is True)
    echo = text_of(body.messages[-1], "messages[-1]") if body.echo else ""
    prompt = await reported_prompts(services, body, [opened.streams[0].prompt_token_ids])
    form = ChatFormat(head, body, opened.streams, names, opened.style, echo, *prompt)
    interval = body.stream_interval or 1
    return await answer(services, caller, opened.streams, form, streamed=body.stream is True, interval=interval)


@attrs.frozen
class PreparedChat:
    """A conversation as a prompt, its final parameters, and how to parse its answer.

    Attributes:
        unreadable: Paths of calls' arguments that are not a complete JSON object.
    """

    prompt_token_ids: list[int]
    params: SamplingParams
    style: MessageStyle
    unreadable: Sequence[str] = ()


async def open_chat(services: Services, body: ChatBody, caller: Caller, answer_id: str) -> OpenChat:
    """Submit a conversation. The caller formats the answer, whose id is `answer_id`, for its API."""
    chat = await read_chat(services, body, caller)
    streams = await submit(services, caller, body, [chat.prompt_token_ids], chat.params, answer_id)
    return OpenChat(streams, chat.params, chat.style)


async def read_chat(services: Services, body: ChatBody, caller: Caller) -> PreparedChat:
    """Check a conversation and prepare it."""
    check_amounts(body, services.config.limits)  # A chat made from another API's body is not checked yet.
    params = sampling_params(
        body,
        info=services.engine.info,
        bad_words=await bad_word_ids(services, body.bad_words),
        max_tokens=_max_tokens(body, services.engine.info),
        logprobs=_num_logprobs(body, services.config.engine.max_logprobs),
        prompt_logprobs=body.prompt_logprobs,
    )
    chat = await prepare_chat(services, body, params)
    warn_of_unreadable(caller, chat.unreadable)
    _warn_of_grammars(caller, unheld_tools(services, body.tools or ()))
    return chat


def _warn_of_grammars(caller: Caller, unheld: Sequence[str]) -> None:
    """Warn of grammars of custom tools' inputs that the model only reads."""
    if unheld:
        more = f" and {len(unheld) - 1} more" if len(unheld) > 1 else ""
        caller.warn(f"The model reads the format of this tool, and is not held to it: {unheld[0]}{more}")


async def prepare_chat(services: Services, body: ChatBody, params: SamplingParams) -> PreparedChat:
    """Render a conversation, and constrain its answer to the requested form and tools."""
    tools = tool_use(services, body)
    prompt = await chat_prompt(services, body, tools.offered)
    style = MessageStyle(
        thinks=services.thinks,
        thinking=services.thinking or THINK,
        thinking_begun=prompt.thinking == "begun",
        tool_form=tools.form,
        parallel=body.parallel_tool_calls is not False,
        show_reasoning=body.include_reasoning is not False,
        response=_response_style(services, body, tools, prompt.answer),
        custom=_custom_tools(services, body),
    )
    params = await _bind(services, body, tools, prompt.thinking, params)
    if style.response is not None:
        params = attrs.evolve(params, skip_special_tokens=False)
    return PreparedChat(prompt.token_ids, params, style, prompt.unreadable)


def _response_style(services: Services, body: ChatBody, tools: ToolUse, prompt: str) -> ResponseStyle | None:
    """Return how the model's own template reads the answer; None if it has none, or a grammar holds it to our forms."""
    if services.response_template is None or tools.grammar is not None or asks_for_form(body):
        return None
    schemas = {function.name: function.parameters for function in tools.functions} if tools.functions else None
    return ResponseStyle(services.response_template, prompt, schemas)


def _custom_tools(services: Services, body: ChatBody) -> CustomTools | None:
    names = frozenset(tool.name for tool in body.tools or () if tool.custom is not None)
    return CustomTools(names, services.config.limits) if names else None


async def _bind(
    services: Services, body: ChatBody, tools: ToolUse, thinking: Thinking, params: SamplingParams
) -> SamplingParams:
    """Constrain the answer to the requested form, and keep the markers that the parsers need in the text."""
    tokenizer = services.tokenizer
    output = await requested_form(services, body) if tools.alongside else None
    forms = [grammar for grammar in (tools.grammar, output) if grammar is not None]
    form = services.thinking or THINK
    if (source := answer_grammar(forms, thinking, tokenizer.added_tokens, form)) is not None:
        params = attrs.evolve(params, grammar=await compile_grammar(services, source))
    params = _limit_thinking(services, body, thinking, params)
    markers = (*(MARKERS[tools.form] if tools.form is not None else ()), *(form.markers if services.thinks else ()))
    if any(marker in tokenizer.special_tokens for marker in markers):
        params = attrs.evolve(params, skip_special_tokens=False)
    return params


def _limit_thinking(services: Services, body: ChatBody, thinking: Thinking, params: SamplingParams) -> SamplingParams:
    """Limit thinking to the request's budget."""
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
    """Return the limit; by default the rest of the context."""
    if body.max_completion_tokens is not None:
        return check_max_tokens("max_completion_tokens", body.max_completion_tokens, info.max_model_len)
    if body.max_tokens == 0:
        raise InvalidRequestError("max_tokens = 0 is not allowed: at least 1.", param="max_tokens")
    return check_max_tokens("max_tokens", body.max_tokens, info.max_model_len)


def _num_logprobs(body: ChatBody, most: int) -> int | None:
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequestError("top_logprobs needs `logprobs=True`.", param="top_logprobs")
    if body.top_logprobs is not None and most >= 0 and not 0 <= body.top_logprobs <= most:
        raise InvalidRequestError(
            f"top_logprobs = {body.top_logprobs} is not allowed: 0 to {most}.", param="top_logprobs"
        )
    return (body.top_logprobs or 0) if body.logprobs else None
