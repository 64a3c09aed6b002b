"""POST /v1/responses: OpenAI's newer API, answered by a chat. Stateless: nothing is stored or looked up."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from quart import Response
from quart_trio import QuartTrio

from trio_llm.errors import InvalidRequestError
from trio_llm.server.bodies import tools as requests
from trio_llm.server.bodies.error_fields import fields_renamed, new_id
from trio_llm.server.bodies.request_body import read_body
from trio_llm.server.bodies.tools import MAX_TOOLS, AllowedTool, NamedToolChoice, ToolReference
from trio_llm.server.bodies.types import ChatBody, JsonSchemaFormat, ResponseFormat
from trio_llm.server.generation.chat_prompt import warn_of_effort
from trio_llm.server.generation.respond import Caller, Head, answer
from trio_llm.server.openai.chat import open_chat
from trio_llm.server.openai.responses_body import (
    AllowedChoice,
    CustomChoice,
    FunctionChoice,
    ResponsesBody,
    TextFormat,
    ToolChoice,
    conversation,
)
from trio_llm.server.openai.responses_format import ResponsesFormat
from trio_llm.server.openai.responses_items import OutputItems
from trio_llm.server.openai.responses_tools import OfferedTool, offered_tools
from trio_llm.server.openai.truncation import shortened
from trio_llm.server.services import Services

_FIELDS = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}
_IN_THE_CLEAR = "reasoning.encrypted_content"
_FOREIGN_CALLS = {"file_search_call", "web_search_call", "code_interpreter_call", "computer_call_output"}


def register(app: QuartTrio, services: Services) -> None:
    """Add the endpoint."""

    @app.post("/v1/responses")
    async def create_response() -> Response:
        return await respond(services, await read_body(ResponsesBody), Caller.current())


async def respond(services: Services, body: ResponsesBody, caller: Caller) -> Response:
    """Answer a checked body."""
    head = Head(new_id("resp"), int(time.time()), services.check_model(body.model))
    _check_include(body, caller)
    warn_of_effort(services, caller, "reasoning.effort", body.reasoning.effort if body.reasoning else None)
    tools = list(offered_tools(body.tools or ()))
    if len(tools) > MAX_TOOLS:
        raise InvalidRequestError(f"{len(tools)} tools are too many: at most {MAX_TOOLS}.", param="tools")
    with fields_renamed(_FIELDS):
        chat = _as_chat(body, tools)
        if body.truncation == "auto":
            chat = await shortened(services, chat, caller)
        opened = await open_chat(services, chat, caller, head.id)
    (stream,) = opened.streams
    items = OutputItems(tools)
    form = ResponsesFormat(head, body, opened.params, stream, opened.style, services.tokenizer, items)
    return await answer(services, caller, opened.streams, form, streamed=body.stream is True)


def _check_include(body: ResponsesBody, caller: Caller) -> None:
    """Refuse `include` values that are not supported, except those of tools that this server cannot run."""
    for name in body.include or ():
        if name == _IN_THE_CLEAR:
            caller.warn("reasoning is in the clear: there is no encrypted_content")
        elif name.partition(".")[0] not in _FOREIGN_CALLS:
            raise InvalidRequestError(f"include {name[:64]!r} is not supported by this server.", param="include")


def _as_chat(body: ResponsesBody, tools: Sequence[OfferedTool]) -> ChatBody:
    choice = _tool_choice(body.tool_choice, tools)
    return ChatBody(
        messages=conversation(body),
        max_completion_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        tools=[tool.definition() for tool in tools] or None,
        tool_choice=choice if tools or choice != "auto" else None,
        parallel_tool_calls=body.parallel_tool_calls,
        response_format=_response_format(body.text.format) if body.text and body.text.format else None,
        reasoning_effort=body.reasoning.effort if body.reasoning else None,
    )


def _tool_choice(choice: ToolChoice, tools: Sequence[OfferedTool]) -> Any:
    """Return a chat's tool_choice, with tools by the names that the model knows."""
    if isinstance(choice, FunctionChoice | CustomChoice):
        return NamedToolChoice(function=_reference(choice, tools))
    if isinstance(choice, AllowedChoice):
        allowed = [AllowedTool(function=_reference(tool, tools)) for tool in choice.tools]
        return NamedToolChoice(
            type="allowed_tools", allowed_tools=requests.AllowedTools(mode=choice.mode, tools=allowed)
        )
    return choice


def _reference(choice: FunctionChoice | CustomChoice, tools: Sequence[OfferedTool]) -> ToolReference:
    name = choice.name
    return ToolReference(name=next((tool.name for tool in tools if name in (tool.name, tool.tool.name)), name))


def _response_format(form: TextFormat) -> ResponseFormat:
    if form.type != "json_schema":
        if form.schema_ is not None:
            raise InvalidRequestError("schema needs type 'json_schema'.", param="text.format.schema")
        return ResponseFormat(type=form.type)
    if form.name is None:
        raise InvalidRequestError("Missing required parameter: 'text.format.name'.", param="text.format.name")
    return ResponseFormat(
        type="json_schema", json_schema=JsonSchemaFormat(name=form.name, schema_=form.schema_, strict=form.strict)
    )
