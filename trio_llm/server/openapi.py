"""The HTTP interface as one OpenAPI document: GET /openapi.json, and GET /docs for people.

Bodies come from the types that requests are checked with, so their fields and limits are what the server enforces.
Answers are described by types of their own, which the tests hold them to, as they hold the table of operations to the
app's routes, both ways.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import attrs
import msgspec
from quart import Response
from quart_trio import QuartTrio

import trio_llm
from trio_llm.config import LimitsConfig
from trio_llm.server import openapi_answers as answers
from trio_llm.server import openapi_stored as stored
from trio_llm.server.amounts import schema_bounds
from trio_llm.server.batches import BatchBody
from trio_llm.server.embeddings import EmbeddingBody
from trio_llm.server.messages_body import CountTokensBody, MessagesBody
from trio_llm.server.openapi_page import page
from trio_llm.server.requests import ChatBody, CompletionBody
from trio_llm.server.responses_body import ResponsesBody
from trio_llm.server.tokenization import DetokenizeBody, TokenizeBody

Method = Literal["get", "post", "delete"]
_JSON, _EVENTS = "application/json", "text/event-stream"
_REF = "#/components/schemas/{name}"


@attrs.frozen
class Operation:
    """One method of one path.

    Attributes:
        body: The type its JSON body is checked with.
        query: Query parameters: name -> JSON schema.
        media: What it answers in.
        answer: What a JSON answer is.
        keys: Where that depends on the model, what it always has.
        events: What the data of each event of a stream is, in JSON or in words.
        status: Of a good answer.
    """

    method: Method
    path: str
    summary: str
    body: type[msgspec.Struct] | None = None
    query: Mapping[str, dict[str, Any]] = attrs.field(factory=dict[str, dict[str, Any]])
    media: tuple[str, ...] = (_JSON,)
    answer: type[msgspec.Struct] | None = None
    keys: tuple[str, ...] = ()
    events: type[msgspec.Struct] | str = ""
    status: int = 200


_ID = {"type": "string", "maxLength": 64}
_ORDER = {"enum": ["asc", "desc"], "default": "desc"}
_SHOWN_AS_STREAM = (_JSON, _EVENTS)

OPERATIONS = (
    Operation("post", "/v1/chat/completions", "Answer a conversation.", ChatBody, media=_SHOWN_AS_STREAM,
              answer=answers.ChatCompletion, events=answers.ChatCompletionChunk),
    Operation("post", "/v1/completions", "Continue a text.", CompletionBody, media=_SHOWN_AS_STREAM,
              answer=answers.Completion, events=answers.Completion),
    Operation("post", "/v1/responses", "Answer in OpenAI's newer form; nothing is stored.", ResponsesBody,
              media=_SHOWN_AS_STREAM, answer=answers.ModelResponse, events="an event of OpenAI's Responses API"),
    Operation("post", "/v1/messages", "Answer a conversation in Anthropic's form.", MessagesBody,
              media=_SHOWN_AS_STREAM, answer=answers.AnthropicMessage, events="an event of Anthropic's Messages API"),
    Operation("post", "/v1/messages/count_tokens", "Count what a message would cost.", CountTokensBody,
              answer=answers.TokenCount),
    Operation("post", "/v1/embeddings", "Turn texts into vectors.", EmbeddingBody, answer=answers.Embeddings),
    Operation("post", "/tokenize", "Turn a text or conversation into token ids.", TokenizeBody,
              answer=answers.Tokenized),
    Operation("post", "/v1/tokenize", "The same.", TokenizeBody, answer=answers.Tokenized),
    Operation("post", "/detokenize", "Turn token ids into text.", DetokenizeBody, answer=answers.Detokenized),
    Operation("post", "/v1/detokenize", "The same.", DetokenizeBody, answer=answers.Detokenized),
    Operation("get", "/tokenizer_info", "Say what the tokenizer is.", keys=("vocab_size",)),
    Operation("get", "/v1/models", "List the model under its names.", answer=answers.Models),
    Operation("get", "/v1/models/{model}", "Describe a model.", answer=answers.Model),
    Operation("post", "/v1/files", "Upload a file (multipart/form-data: file, purpose).", answer=stored.File),
    Operation("get", "/v1/files", "List your files.", answer=stored.Files,
              query={"limit": {"type": "integer", "minimum": 1, "maximum": 10_000}, "after": _ID, "order": _ORDER,
                     "purpose": {"type": "string"}}),
    Operation("get", "/v1/files/{file_id}", "Describe a file.", answer=stored.File),
    Operation("get", "/v1/files/{file_id}/content", "Read a file.", media=("application/octet-stream",)),
    Operation("delete", "/v1/files/{file_id}", "Delete a file.", answer=stored.Deleted),
    Operation("post", "/v1/batches", "Submit a batch: an uploaded file, or a list of prompts.", BatchBody,
              answer=stored.Batch),
    Operation("get", "/v1/batches", "List your batches.", answer=stored.Batches,
              query={"limit": {"type": "integer", "minimum": 1, "maximum": 100}, "after": _ID}),
    Operation("get", "/v1/batches/{batch_id}", "Describe a batch.", answer=stored.Batch),
    Operation("post", "/v1/batches/{batch_id}/cancel", "Cancel a batch; what is answered stays.", answer=stored.Batch),
    Operation("get", "/v1/batches/{batch_id}/results", "Read output and errors of a batch.",
              media=("application/jsonl",)),
    Operation("get", "/health", "Say whether requests are served.", answer=answers.Status),
    Operation("get", "/ping", "The same.", answer=answers.Status),
    Operation("post", "/ping", "The same.", answer=answers.Status),
    Operation("get", "/load", "Count the requests under way.", answer=answers.Load),
    Operation("get", "/version", "Say which version this is.", answer=answers.Version),
    Operation("get", "/metrics", "Metrics in Prometheus' text format.", media=("text/plain",)),
    Operation("get", "/shutdown", "End the server in good order.", answer=answers.Status, status=202),
    Operation("post", "/shutdown", "The same.", answer=answers.Status, status=202),
    Operation("get", "/openapi.json", "This document.", keys=("openapi", "paths")),
    Operation("get", "/docs", "This document, for people.", media=("text/html",)),
)  # fmt: skip

_UPLOAD = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"enum": ["batch", "user_data", "assistants", "fine-tune", "vision", "evals"]},
        "expires_after[anchor]": {"enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2_592_000},
    },
}
_ERROR = {
    "type": "object",
    "description": "What every request that fails is answered.",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"], "description": "The field that is wrong."},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_ANTHROPIC_ERROR = {
    "type": "object",
    "description": "The same under /v1/messages, as Anthropic spells it.",
    "required": ["type", "error"],
    "properties": {
        "type": {"enum": ["error"]},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
    },
}


def register(app: QuartTrio, limits: LimitsConfig) -> None:
    """Add the endpoints."""
    whole = document(limits)
    encoded, shown = msgspec.json.encode(whole), page(whole)
    # The page is text and style: nothing on it may load or run anything.
    policy = "default-src 'none'; style-src 'unsafe-inline'"

    @app.get("/openapi.json")
    async def openapi() -> Response:
        return Response(encoded, content_type=_JSON)

    @app.get("/docs")
    async def docs() -> Response:
        return Response(shown, content_type="text/html; charset=utf-8", headers={"Content-Security-Policy": policy})


def document(limits: LimitsConfig) -> dict[str, Any]:
    """Return the OpenAPI document of a server with these limits."""
    components = _components(operation.body for operation in OPERATIONS)
    for schema in components.values():
        _bound(schema.get("properties", {}), schema_bounds(limits))
    told = _components(kind for operation in OPERATIONS for kind in (operation.answer, operation.events))
    assert components.keys().isdisjoint(told), "a type of a request and one of an answer have the same name"
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation)
    return {
        "openapi": "3.1.0",
        "info": {"title": "trio-llm", "version": trio_llm.__version__},
        "paths": paths,
        "components": {
            "schemas": {**components, **told, "Error": _ERROR, "AnthropicError": _ANTHROPIC_ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        # A key is needed where the server has any.
        "security": [{}, {"key": []}],
    }


def _components(kinds: Iterable[type[msgspec.Struct] | str | None]) -> dict[str, Any]:
    """Return the schemas of types and of all that is in them, by name."""
    types = dict.fromkeys(kind for kind in kinds if isinstance(kind, type))
    _, components = msgspec.json.schema_components(types, ref_template=_REF)
    return components


def _bound(properties: Mapping[str, Any], bounds: Mapping[str, Mapping[str, Any]]) -> None:
    """Add the limits that are settings to the fields they are about."""
    for name in properties.keys() & bounds.keys():
        for form in properties[name].get("anyOf", [properties[name]]):
            kind = {"integer": "maximum", "array": "maxItems", "object": "maxProperties"}.get(form.get("type", ""))
            if kind in bounds[name]:
                form.update(bounds[name])


def _operation(operation: Operation) -> dict[str, Any]:
    name = re.sub(r"[^a-z0-9]+", "_", operation.path.lower()).strip("_")
    described: dict[str, Any] = {"operationId": f"{operation.method}_{name}", "summary": operation.summary}
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in re.findall(r"\{(\w+)\}", operation.path)
    ]
    parameters += [{"name": name, "in": "query", "schema": schema} for name, schema in operation.query.items()]
    if parameters:
        described["parameters"] = parameters
    if operation.path == "/v1/files" and operation.method == "post":
        described["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": _UPLOAD}}}
    elif operation.body is not None:
        schema = {"$ref": _REF.format(name=operation.body.__name__)}
        described["requestBody"] = {"required": True, "content": {_JSON: {"schema": schema}}}
    contents: dict[str, Any] = {media: _answer(operation, media) for media in operation.media}
    described["responses"] = {
        str(operation.status): {"description": "Done.", "content": contents},
        "default": {
            "description": "Refused or failed.",
            "content": {_JSON: {"schema": {"$ref": _REF.format(name=_error_name(operation.path))}}},
        },
    }
    return described


def _error_name(path: str) -> str:
    return "AnthropicError" if path.startswith("/v1/messages") else "Error"


def _answer(operation: Operation, media: str) -> dict[str, Any]:
    if media == _JSON and operation.answer is not None:
        return {"schema": {"$ref": _REF.format(name=operation.answer.__name__)}}
    if media == _JSON:
        return {"schema": {"type": "object", "required": list(operation.keys)}}
    return {"schema": {"type": "string", **(_events(operation.events) if media == _EVENTS else {})}}


def _events(data: type[msgspec.Struct] | str) -> dict[str, Any]:
    """Describe server-sent events."""
    if isinstance(data, str):
        return {"description": f"Server-sent events; the data of each is {data} in JSON."}
    return {
        "description": f"Server-sent events; the data of each is a {data.__name__} in JSON, of the last one [DONE].",
        "contentMediaType": _JSON,
        "contentSchema": {"$ref": _REF.format(name=data.__name__)},
    }
