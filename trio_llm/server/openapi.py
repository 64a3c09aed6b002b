"""The HTTP interface as one OpenAPI document: GET /openapi.json, and GET /docs for people.

Bodies come from the types that requests are checked with, so their fields and limits are what the server enforces.
The table of operations is held to the app's routes, both ways, by the tests.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

import attrs
import msgspec
from quart import Response
from quart_trio import QuartTrio

import trio_llm
from trio_llm.config import LimitsConfig
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
        keys: What a JSON answer always has.
        status: Of a good answer.
    """

    method: Method
    path: str
    summary: str
    body: type[msgspec.Struct] | None = None
    query: Mapping[str, dict[str, Any]] = attrs.field(factory=dict[str, dict[str, Any]])
    media: tuple[str, ...] = (_JSON,)
    keys: tuple[str, ...] = ()
    status: int = 200


_ID = {"type": "string", "maxLength": 64}
_ORDER = {"enum": ["asc", "desc"], "default": "desc"}
_PAGE = ("object", "data", "has_more")
_FILE = ("id", "object", "bytes", "created_at", "filename", "purpose")
_BATCH = ("id", "object", "endpoint", "input_file_id", "status", "created_at", "request_counts")
_SHOWN_AS_STREAM = (_JSON, _EVENTS)

OPERATIONS = (
    Operation("post", "/v1/chat/completions", "Answer a conversation.", ChatBody, media=_SHOWN_AS_STREAM,
              keys=("id", "object", "created", "model", "choices", "usage")),
    Operation("post", "/v1/completions", "Continue a text.", CompletionBody, media=_SHOWN_AS_STREAM,
              keys=("id", "object", "created", "model", "choices", "usage")),
    Operation("post", "/v1/responses", "Answer in OpenAI's newer form; nothing is stored.", ResponsesBody,
              media=_SHOWN_AS_STREAM, keys=("id", "object", "status", "output")),
    Operation("post", "/v1/messages", "Answer a conversation in Anthropic's form.", MessagesBody,
              media=_SHOWN_AS_STREAM, keys=("id", "type", "role", "content", "usage")),
    Operation("post", "/v1/messages/count_tokens", "Count what a message would cost.", CountTokensBody,
              keys=("input_tokens",)),
    Operation("post", "/v1/embeddings", "Turn texts into vectors.", EmbeddingBody, keys=("object", "data", "usage")),
    Operation("post", "/tokenize", "Turn a text or conversation into token ids.", TokenizeBody,
              keys=("count", "max_model_len", "tokens")),
    Operation("post", "/v1/tokenize", "The same.", TokenizeBody, keys=("count", "max_model_len", "tokens")),
    Operation("post", "/detokenize", "Turn token ids into text.", DetokenizeBody, keys=("prompt",)),
    Operation("post", "/v1/detokenize", "The same.", DetokenizeBody, keys=("prompt",)),
    Operation("get", "/tokenizer_info", "Say what the tokenizer is.", keys=("vocab_size",)),
    Operation("get", "/v1/models", "List the model under its names.", keys=("object", "data")),
    Operation("get", "/v1/models/{model}", "Describe a model.", keys=("id", "object", "max_model_len")),
    Operation("post", "/v1/files", "Upload a file (multipart/form-data: file, purpose).", keys=_FILE),
    Operation("get", "/v1/files", "List your files.", keys=_PAGE,
              query={"limit": {"type": "integer", "minimum": 1, "maximum": 10_000}, "after": _ID, "order": _ORDER,
                     "purpose": {"type": "string"}}),
    Operation("get", "/v1/files/{file_id}", "Describe a file.", keys=_FILE),
    Operation("get", "/v1/files/{file_id}/content", "Read a file.", media=("application/octet-stream",)),
    Operation("delete", "/v1/files/{file_id}", "Delete a file.", keys=("id", "object", "deleted")),
    Operation("post", "/v1/batches", "Submit a batch: an uploaded file, or a list of prompts.", BatchBody, keys=_BATCH),
    Operation("get", "/v1/batches", "List your batches.", keys=_PAGE,
              query={"limit": {"type": "integer", "minimum": 1, "maximum": 100}, "after": _ID}),
    Operation("get", "/v1/batches/{batch_id}", "Describe a batch.", keys=_BATCH),
    Operation("post", "/v1/batches/{batch_id}/cancel", "Cancel a batch; what is answered stays.", keys=_BATCH),
    Operation("get", "/v1/batches/{batch_id}/results", "Read output and errors of a batch.",
              media=("application/jsonl",)),
    Operation("get", "/health", "Say whether requests are served.", keys=("status",)),
    Operation("get", "/ping", "The same.", keys=("status",)),
    Operation("post", "/ping", "The same.", keys=("status",)),
    Operation("get", "/load", "Count the sequences that run and wait.", keys=("server_load",)),
    Operation("get", "/version", "Say which version this is.", keys=("version",)),
    Operation("get", "/metrics", "Metrics in Prometheus' text format.", media=("text/plain",)),
    Operation("get", "/shutdown", "End the server in good order.", keys=("status",), status=202),
    Operation("post", "/shutdown", "The same.", keys=("status",), status=202),
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
    kinds = list(dict.fromkeys(operation.body for operation in OPERATIONS if operation.body is not None))
    _, components = msgspec.json.schema_components(kinds, ref_template=_REF)
    for schema in components.values():
        _bound(schema.get("properties", {}), schema_bounds(limits))
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation)
    return {
        "openapi": "3.1.0",
        "info": {"title": "trio-llm", "version": trio_llm.__version__},
        "paths": paths,
        "components": {
            "schemas": {**components, "Error": _ERROR, "AnthropicError": _ANTHROPIC_ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        # A key is needed where the server has any.
        "security": [{}, {"key": []}],
    }


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
    answers: dict[str, Any] = {media: _answer(operation, media) for media in operation.media}
    described["responses"] = {
        str(operation.status): {"description": "Done.", "content": answers},
        "default": {
            "description": "Refused or failed.",
            "content": {_JSON: {"schema": {"$ref": _REF.format(name=_error_name(operation.path))}}},
        },
    }
    return described


def _error_name(path: str) -> str:
    return "AnthropicError" if path.startswith("/v1/messages") else "Error"


def _answer(operation: Operation, media: str) -> dict[str, Any]:
    if media == _JSON:
        return {"schema": {"type": "object", "required": list(operation.keys)}}
    return {"schema": {"type": "string"}}
