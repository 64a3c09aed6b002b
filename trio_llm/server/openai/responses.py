"""POST /v1/responses: OpenAI's newer API, answered by a chat. Stateless: nothing is stored or looked up."""

from __future__ import annotations

import time
from collections.abc import Sequence

from quart import Response
from quart_trio import QuartTrio

from trio_llm.errors import InvalidRequestError
from trio_llm.server.bodies import types as requests
from trio_llm.server.bodies.error_fields import fields_renamed, new_id
from trio_llm.server.bodies.request_body import read_body
from trio_llm.server.bodies.types import MAX_TOOLS, ChatBody, JsonSchemaFormat, NamedToolChoice, ResponseFormat
from trio_llm.server.generation.chat_prompt import warn_of_effort
from trio_llm.server.generation.respond import Caller, Head, answer
from trio_llm.server.openai.chat import open_chat
from trio_llm.server.openai.responses_body import FunctionChoice, ResponsesBody, TextFormat, conversation
from trio_llm.server.openai.responses_format import ResponsesFormat
from trio_llm.server.openai.responses_items import OutputItems
from trio_llm.server.openai.responses_tools import OfferedTool, offered_tools
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
    # Of Gemma 4's calls, and of those in a form of a model's own, no grammar can hold a text to an expression.
    binds = services.tool_form not in (None, "gemma4")
    _warn_of_grammars(caller, tools, binds=binds)
    with fields_renamed(_FIELDS):
        opened = await open_chat(services, _as_chat(body, tools, binds=binds), caller, head.id)
    (stream,) = opened.streams
    items = OutputItems(tools, services.config.limits)
    form = ResponsesFormat(head, body, opened.params, stream, opened.style, services.tokenizer, items)
    return await answer(services, caller, opened.streams, form, streamed=body.stream is True)


def _check_include(body: ResponsesBody, caller: Caller) -> None:
    """Refuse `include` values that are not supported, except those of tools that this server cannot run."""
    for name in body.include or ():
        if name == _IN_THE_CLEAR:
            caller.warn("reasoning is in the clear: there is no encrypted_content")
        elif name.partition(".")[0] not in _FOREIGN_CALLS:
            raise InvalidRequestError(f"include {name[:64]!r} is not supported by this server.", param="include")


def _warn_of_grammars(caller: Caller, tools: Sequence[OfferedTool], *, binds: bool) -> None:
    """Warn of grammars of custom tools' inputs that the model only reads."""
    free = [tool.name for tool in tools if tool.syntax == "lark" or (tool.syntax == "regex" and not binds)]
    if free:
        more = f" and {len(free) - 1} more" if len(free) > 1 else ""
        caller.warn(f"The model reads the format of this tool, and is not held to it: {free[0]}{more}")


def _as_chat(body: ResponsesBody, tools: Sequence[OfferedTool], *, binds: bool) -> ChatBody:
    choice = body.tool_choice
    if isinstance(choice, FunctionChoice):
        name = next((tool.name for tool in tools if choice.name in (tool.name, tool.tool.name)), choice.name)
        choice = NamedToolChoice(function=requests.FunctionName(name=name))
    return ChatBody(
        messages=conversation(body),
        max_completion_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        tools=[tool.definition(binds=binds) for tool in tools] or None,
        tool_choice=choice if tools or choice != "auto" else None,
        parallel_tool_calls=body.parallel_tool_calls,
        response_format=_response_format(body.text.format) if body.text and body.text.format else None,
        reasoning_effort=body.reasoning.effort if body.reasoning else None,
    )


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
