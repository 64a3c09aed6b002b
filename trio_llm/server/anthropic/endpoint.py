"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API, answered by a chat."""

from __future__ import annotations

import time
from typing import Any

from quart import Response
from quart_trio import QuartTrio

from trio_llm.errors import InvalidRequestError
from trio_llm.server.answers.messages import TokenCount
from trio_llm.server.anthropic.body import CountTokensBody, MessagesBody, OutputConfig, ToolChoice, conversation
from trio_llm.server.anthropic.format import MessagesFormat
from trio_llm.server.bodies import tools as requests
from trio_llm.server.bodies.error_fields import fields_renamed, new_id
from trio_llm.server.bodies.request_body import read_body
from trio_llm.server.bodies.tools import NamedToolChoice, ToolDefinition
from trio_llm.server.bodies.types import ChatBody, JsonSchemaFormat, ResponseFormat
from trio_llm.server.constraints.tool_choice import tool_use
from trio_llm.server.generation.chat_prompt import chat_prompt
from trio_llm.server.generation.respond import Caller, Head, answer
from trio_llm.server.http.json_response import json_response
from trio_llm.server.openai.chat import open_chat
from trio_llm.server.services import Services

_FIELDS = {
    "max_completion_tokens": "max_tokens",
    "stop": "stop_sequences",
    "thinking_token_budget": "thinking.budget_tokens",
    "response_format.json_schema": "output_config.format",
    "response_format": "output_config.format",
}
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def register(app: QuartTrio, services: Services) -> None:
    """Add the endpoints."""

    @app.post("/v1/messages")
    async def create_message() -> Response:
        return await answer_message(services, await read_body(MessagesBody), Caller.current())

    @app.post("/v1/messages/count_tokens")
    async def count_tokens() -> Response:
        body = await read_body(CountTokensBody)
        services.check_model(body.model)
        with fields_renamed(_FIELDS):
            chat = _as_chat(services, body)
            prompt = await chat_prompt(services, chat, tool_use(services, chat).offered)
        return json_response(TokenCount(input_tokens=len(prompt.token_ids)))


async def answer_message(services: Services, body: MessagesBody, caller: Caller) -> Response:
    """Answer a checked body."""
    head = Head(new_id("msg"), int(time.time()), services.check_model(body.model))
    _warn_of_thinking(services, body, caller)
    with fields_renamed(_FIELDS):
        chat = _as_chat(services, body)
        chat.max_completion_tokens = body.max_tokens
        chat.stop = body.stop_sequences
        chat.thinking_token_budget = _budget(services, body, caller)
        chat.temperature, chat.top_p, chat.top_k = body.temperature, body.top_p, body.top_k
        opened = await open_chat(services, chat, caller, head.id)
    (stream,) = opened.streams
    form = MessagesFormat(head, stream, opened.style)
    return await answer(services, caller, opened.streams, form, streamed=body.stream is True)


def _as_chat(services: Services, body: CountTokensBody) -> ChatBody:
    messages = conversation(body)
    # A final turn of the assistant is the beginning of the answer.
    continues = messages[-1].role == "assistant" and not messages[-1].tool_calls
    if continues and body.thinking is not None and body.thinking.type == "enabled":
        raise InvalidRequestError("Thinking and an answer that is already begun exclude each other.", param="thinking")
    return ChatBody(
        messages=messages,
        continue_final_message=continues,
        tools=[
            ToolDefinition(
                function=requests.Function(
                    name=tool.name, description=tool.description, parameters=tool.input_schema, strict=tool.strict
                )
            )
            for tool in body.tools or ()
        ]
        or None,
        tool_choice=_tool_choice(body.tool_choice) if body.tool_choice else None,
        parallel_tool_calls=not (body.tool_choice is not None and body.tool_choice.disable_parallel_tool_use),
        response_format=_response_format(body.output_config) if body.output_config else None,
        reasoning_effort=_effort(services, body.output_config),
        include_reasoning=body.thinking is None or body.thinking.display != "omitted",
        chat_template_kwargs=_thinking(services, body),
    )


def _tool_choice(choice: ToolChoice) -> Any:
    if choice.type != "tool":
        return _CHOICES[choice.type]
    if choice.name is None:
        raise InvalidRequestError("Missing required parameter: 'tool_choice.name'.", param="tool_choice.name")
    return NamedToolChoice(function=requests.ToolReference(name=choice.name))


def _response_format(config: OutputConfig) -> ResponseFormat | None:
    if config.format is None:
        return None
    form = JsonSchemaFormat(name="output", schema_=config.format.schema_)
    return ResponseFormat(type="json_schema", json_schema=form)


def _effort(services: Services, config: OutputConfig | None) -> Any:
    """Return the effort, None if the template does not use it."""
    return config.effort if config is not None and services.knows_variable("reasoning_effort") else None


def _thinking(services: Services, body: CountTokensBody) -> dict[str, Any] | None:
    """Return the template's variables: a model with optional thinking thinks only if requested."""
    asked = body.thinking is not None and body.thinking.type != "disabled"
    return {"enable_thinking": asked} if services.knows_variable("enable_thinking") else None


def _budget(services: Services, body: MessagesBody, caller: Caller) -> int | None:
    """Return the maximum of thinking tokens, None if there is no limit or it cannot be enforced for the model."""
    budget = body.thinking.budget_tokens if body.thinking is not None and services.thinks else None
    if budget is not None and services.thinking_markers[1] is None:
        caller.warn("thinking.budget_tokens is not enforced; max_tokens is")
        return None
    return budget


def _warn_of_thinking(services: Services, body: MessagesBody, caller: Caller) -> None:
    """Warn of hints about thinking that this model cannot follow."""
    kind = body.thinking.type if body.thinking is not None else None
    if kind == "enabled" and not services.thinks:
        caller.warn("Ignored hints: thinking (this model does not think)")
    if kind == "disabled" and services.thinks and not services.knows_variable("enable_thinking"):
        caller.warn("Ignored hints: thinking (this model always thinks)")
    effort = body.output_config.effort if body.output_config is not None else None
    if effort not in (None, "high") and not services.knows_variable("reasoning_effort"):
        caller.warn("Ignored hints: output_config.effort (this model knows no effort)")
