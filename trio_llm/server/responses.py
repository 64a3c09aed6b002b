"""POST /v1/responses: OpenAI's newer API, told of the same chat. Stateless: nothing is stored, nothing looked up."""

from __future__ import annotations

import time
from typing import Any

from quart import Response
from quart_trio import QuartTrio

from trio_llm.errors import InvalidRequestError
from trio_llm.server import requests
from trio_llm.server.body import read_body
from trio_llm.server.chat import open_chat
from trio_llm.server.generation import Caller, Head, typed_answer
from trio_llm.server.requests import ChatBody, JsonSchemaFormat, NamedToolChoice, ResponseFormat, ToolDefinition
from trio_llm.server.responses_body import FunctionChoice, ResponsesBody, TextFormat, conversation
from trio_llm.server.responses_format import ResponsesFormat
from trio_llm.server.services import Services
from trio_llm.server.translation import fields_renamed, new_id

_FIELDS = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}
_IN_THE_CLEAR = "reasoning.encrypted_content"


def register(app: QuartTrio, services: Services) -> None:
    """Add the endpoint."""

    @app.post("/v1/responses")
    async def create_response() -> Response | dict[str, Any]:
        return await respond(services, await read_body(ResponsesBody), Caller.current())


async def respond(services: Services, body: ResponsesBody, caller: Caller) -> Response | dict[str, Any]:
    """Answer a checked body."""
    head = Head(new_id("resp"), int(time.time()), services.check_model(body.model))
    _check(body, caller)
    with fields_renamed(_FIELDS):
        opened = await open_chat(services, _as_chat(body), caller)
    (stream,) = opened.streams
    form = ResponsesFormat(head, body, stream, opened.style, services.tokenizer)
    return await typed_answer(caller, stream, form, streamed=body.stream is True)


def _check(body: ResponsesBody, caller: Caller) -> None:
    """Refuse by name what is asked for inside fields of which only parts are supported."""
    for name in body.include or ():
        if name != _IN_THE_CLEAR:
            raise InvalidRequestError(f"include {name[:64]!r} is not supported by this server.", param="include")
        caller.warn("reasoning is in the clear: there is no encrypted_content")
    if body.text is not None and body.text.verbosity not in (None, "medium"):
        raise InvalidRequestError("'text.verbosity' is not supported by this server.", param="text.verbosity")
    for field in ("summary", "generate_summary"):
        # "auto" leaves it to the server, and the whole reasoning is the best that it has.
        if body.reasoning is not None and getattr(body.reasoning, field) not in (None, "auto"):
            where = f"reasoning.{field}"
            raise InvalidRequestError(f"'{where}' is not supported by this server.", param=where)


def _as_chat(body: ResponsesBody) -> ChatBody:
    choice = body.tool_choice
    if isinstance(choice, FunctionChoice):
        choice = NamedToolChoice(function=requests.FunctionName(name=choice.name))
    return ChatBody(
        messages=conversation(body),
        max_completion_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        tools=[
            ToolDefinition(
                function=requests.Function(
                    name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict
                )
            )
            for tool in body.tools or ()
        ]
        or None,
        tool_choice=choice if body.tools or choice != "auto" else None,
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
