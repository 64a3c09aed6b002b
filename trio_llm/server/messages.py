"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API, told of the same chat."""

from __future__ import annotations

import time
from typing import Any

from quart import Response
from quart_trio import QuartTrio

from trio_llm.errors import InvalidRequestError
from trio_llm.server import requests
from trio_llm.server.body import read_body
from trio_llm.server.chat import open_chat
from trio_llm.server.conversation import chat_prompt
from trio_llm.server.generation import Caller, Head, typed_answer
from trio_llm.server.messages_body import CountTokensBody, MessagesBody, OutputConfig, ToolChoice, conversation
from trio_llm.server.messages_format import MessagesFormat
from trio_llm.server.requests import ChatBody, JsonSchemaFormat, NamedToolChoice, ResponseFormat, ToolDefinition
from trio_llm.server.services import Services
from trio_llm.server.tool_choice import tool_use
from trio_llm.server.translation import fields_renamed, new_id

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
    async def create_message() -> Response | dict[str, Any]:
        return await answer_message(services, await read_body(MessagesBody), Caller.current())

    @app.post("/v1/messages/count_tokens")
    async def count_tokens() -> dict[str, Any]:
        body = await read_body(CountTokensBody)
        services.check_model(body.model)
        with fields_renamed(_FIELDS):
            chat = _as_chat(services, body)
            prompt = await chat_prompt(services, chat, tool_use(services, chat).shown)
        return {"input_tokens": len(prompt.token_ids)}


async def answer_message(services: Services, body: MessagesBody, caller: Caller) -> Response | dict[str, Any]:
    """Answer a checked body."""
    head = Head(new_id("msg"), int(time.time()), services.check_model(body.model))
    budget = body.thinking.budget_tokens if body.thinking is not None else None
    if budget is not None and services.thinking_markers[1] is None:
        budget = None
        caller.warn("thinking.budget_tokens is not enforced; max_tokens is")
    with fields_renamed(_FIELDS):
        chat = _as_chat(services, body)
        chat.max_completion_tokens = body.max_tokens
        chat.stop = body.stop_sequences
        chat.thinking_token_budget = budget
        chat.temperature, chat.top_p, chat.top_k = body.temperature, body.top_p, body.top_k
        opened = await open_chat(services, chat, caller)
    (stream,) = opened.streams
    form = MessagesFormat(head, stream, opened.style)
    return await typed_answer(caller, stream, form, streamed=body.stream is True)


def _as_chat(services: Services, body: CountTokensBody) -> ChatBody:
    messages = conversation(body)
    # An assistant's turn at the end is the beginning of the answer.
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
        chat_template_kwargs=_thinking(services, body),
    )


def _tool_choice(choice: ToolChoice) -> Any:
    if choice.type != "tool":
        return _CHOICES[choice.type]
    if choice.name is None:
        raise InvalidRequestError("Missing required parameter: 'tool_choice.name'.", param="tool_choice.name")
    return NamedToolChoice(function=requests.FunctionName(name=choice.name))


def _response_format(config: OutputConfig) -> ResponseFormat | None:
    if config.format is None:
        return None
    form = JsonSchemaFormat(name="output", schema_=config.format.schema_)
    return ResponseFormat(type="json_schema", json_schema=form)


def _effort(services: Services, config: OutputConfig | None) -> Any:
    """Return how hard to try; the highest is Anthropic's default and asks for nothing."""
    effort = config.effort if config is not None else None
    if effort in (None, "high") or services.knows_variable("reasoning_effort"):
        return effort if services.knows_variable("reasoning_effort") else None
    raise InvalidRequestError("This model knows no effort but 'high'.", param="output_config.effort")


def _thinking(services: Services, body: CountTokensBody) -> dict[str, Any] | None:
    """Return the template's variables: a model that need not think does so only where it is asked to."""
    kind = body.thinking.type if body.thinking is not None else None
    adjustable = services.knows_variable("enable_thinking")
    if body.thinking is not None and body.thinking.display == "omitted":
        raise InvalidRequestError("'thinking.display' is not supported by this server.", param="thinking.display")
    if kind == "enabled" and not services.thinks:
        raise InvalidRequestError("This model does not think.", param="thinking.type")
    if kind == "disabled" and services.thinks and not adjustable:
        raise InvalidRequestError("This model's thinking cannot be switched off.", param="thinking.type")
    return {"enable_thinking": kind in ("enabled", "adaptive")} if adjustable else None
