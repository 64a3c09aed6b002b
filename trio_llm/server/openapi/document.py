"""The HTTP interface as one OpenAPI document: GET /openapi.json; `ui` renders it.

Bodies come from the types that check requests, so the document has the fields and limits that the server enforces.
Answers come from the types that the server sends. Tests compare answers with the types, and the table of operations
with the app's routes, in both directions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from types import UnionType
from typing import Any, Literal, get_args

import attrs
import msgspec
import trio
from quart import Response
from quart_trio import QuartTrio

import trio_llm
from trio_llm.config import LimitsConfig
from trio_llm.server.answers import completions, live, messages, models, rendered, requests, responses, stored
from trio_llm.server.answers.errors import AnthropicError, Error
from trio_llm.server.anthropic.body import CountTokensBody, MessagesBody
from trio_llm.server.batches.endpoint import BatchBody
from trio_llm.server.bodies.size_limits import schema_bounds
from trio_llm.server.bodies.types import ChatBody, CompletionBody
from trio_llm.server.openai.embeddings import EmbeddingBody
from trio_llm.server.openai.responses_body import ResponsesBody
from trio_llm.server.openai.tokenization import DetokenizeBody, TokenizeBody
from trio_llm.server.openapi import ui
from trio_llm.server.openapi.descriptions import describe
from trio_llm.server.ui.live import RecordBody

Method = Literal["get", "post", "delete"]
_JSON, _EVENTS = "application/json", "text/event-stream"
_REF = "#/components/schemas/{name}"


@attrs.frozen
class Operation:
    """One method of one path.

    Attributes:
        body: The type of its JSON body.
        query: Query parameters: name -> JSON schema.
        media: Media types of the answer.
        answer: Type of a JSON answer.
        listed: Whether the answer is a list of these.
        keys: Required keys of an answer that depends on the model.
        events: Type of the data of each event of a stream, or a union of types.
        status: Of a successful answer.
    """

    method: Method
    path: str
    summary: str
    body: type[msgspec.Struct] | None = None
    query: Mapping[str, dict[str, Any]] = attrs.field(factory=dict[str, dict[str, Any]])
    media: tuple[str, ...] = (_JSON,)
    answer: type[msgspec.Struct] | None = None
    listed: bool = False
    keys: tuple[str, ...] = ()
    events: type[msgspec.Struct] | UnionType | None = None
    status: int = 200


_ID = {"type": "string", "maxLength": 64}
_ORDER = {"enum": ["asc", "desc"], "default": "desc"}
_SHOWN_AS_STREAM = (_JSON, _EVENTS)

OPERATIONS = (
    Operation("post", "/v1/chat/completions", "Answer a conversation.", ChatBody, media=_SHOWN_AS_STREAM,
              answer=completions.ChatCompletion, events=completions.ChatCompletionChunk),
    Operation("post", "/v1/completions", "Continue a text.", CompletionBody, media=_SHOWN_AS_STREAM,
              answer=completions.Completion, events=completions.Completion),
    Operation("post", "/v1/chat/completions/render", "Say what a conversation would be answered from.", ChatBody,
              answer=rendered.RenderedRequest),
    Operation("post", "/v1/completions/render", "Say what texts would be continued from.", CompletionBody,
              answer=rendered.RenderedRequest, listed=True),
    Operation("post", "/v1/responses", "Answer in OpenAI's newer form; nothing is stored.", ResponsesBody,
              media=_SHOWN_AS_STREAM, answer=responses.ModelResponse, events=responses.Event),
    Operation("post", "/v1/messages", "Answer a conversation in Anthropic's form.", MessagesBody,
              media=_SHOWN_AS_STREAM, answer=messages.AnthropicMessage, events=messages.MessageEvent | AnthropicError),
    Operation("post", "/v1/messages/count_tokens", "Count what a message would cost.", CountTokensBody,
              answer=messages.TokenCount),
    Operation("get", "/v1/requests/{request_id}/explain", "Say where the time of one of your requests went.",
              answer=requests.ExplainedRequest),
    Operation("post", "/v1/requests/{request_id}/cancel", "End one of your requests early.",
              answer=requests.CancelledRequest),
    Operation("get", "/v1/engine/live", "Watch the engine: its newest state, several times a second.", media=(_EVENTS,),
              events=live.LiveFrame),
    Operation("post", "/v1/engine/record", "Stop recording steps, or go on.", RecordBody, answer=live.Recording),
    Operation("post", "/v1/embeddings", "Turn texts into vectors.", EmbeddingBody, answer=models.Embeddings),
    Operation("post", "/tokenize", "Turn a text or conversation into token ids.", TokenizeBody,
              answer=models.Tokenized),
    Operation("post", "/v1/tokenize", "The same.", TokenizeBody, answer=models.Tokenized),
    Operation("post", "/detokenize", "Turn token ids into text.", DetokenizeBody, answer=models.Detokenized),
    Operation("post", "/v1/detokenize", "The same.", DetokenizeBody, answer=models.Detokenized),
    Operation("get", "/tokenizer_info", "Say what the tokenizer is.", keys=("vocab_size",)),
    Operation("get", "/v1/models", "List the model under its names.", answer=models.Models),
    Operation("get", "/v1/models/{model}", "Describe a model.", answer=models.Model),
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
    Operation("get", "/health", "Say whether requests are served.", answer=models.Status),
    Operation("get", "/ready", "Say whether more requests should be sent here.", answer=models.Status),
    Operation("get", "/ping", "The same.", answer=models.Status),
    Operation("post", "/ping", "The same.", answer=models.Status),
    Operation("get", "/load", "Count the requests under way.", answer=models.Load),
    Operation("get", "/version", "Say which version this is.", answer=models.Version),
    Operation("get", "/metrics", "Metrics in Prometheus' text format.", media=("text/plain",)),
    Operation("get", "/shutdown", "End the server in good order.", answer=models.Status, status=202),
    Operation("post", "/shutdown", "The same.", answer=models.Status, status=202),
    Operation("get", "/openapi.json", "This document.", keys=("openapi", "paths")),
    Operation("get", "/", "The page: a chat, and the engine at work.", media=("text/html",)),
    Operation("get", "/ui/{asset}", "A file of the page.", media=("text/javascript", "text/css", "image/svg+xml")),
    Operation("get", "/docs", "This document, for people.", media=("text/html",)),
    Operation("get", "/docs/{asset}", "A script or style sheet of that page.", media=("text/javascript", "text/css")),
)  # fmt: skip

_TAGS = {
    "Answers": ("/v1/chat", "/v1/completions", "/v1/responses", "/v1/messages"),
    "Vectors and tokens": ("/v1/embeddings", "/tokenize", "/v1/tokenize", "/detokenize", "/v1/detokenize"),
    "Requests": ("/v1/requests",),
    "Engine": ("/v1/engine",),
    "Models": ("/v1/models", "/tokenizer_info"),
    "Files": ("/v1/files",),
    "Batches": ("/v1/batches",),
    "Server": ("/",),
}
_PARAMETERS = {
    "model": "A served name.",
    "file_id": "Id of a file.",
    "batch_id": "Id of a batch.",
    "request_id": "Id of the request's answer.",
    "asset": "Name of the file.",
    "limit": "Entries of a page.",
    "after": "Id of the entry before the page.",
    "order": "Order by age.",
    "purpose": "Only files that were uploaded for this.",
}
_EXAMPLES: dict[str, Any] = {
    "messages": [{"role": "user", "content": "What is the capital of Japan?"}],
    "prompt": "Once upon a time",
    "input": "What is the capital of Japan?",
    "tokens": [1, 2, 3],
    "endpoint": "completions",
    "prompts": ["Once upon a time", "The capital of Japan is"],
    "max_tokens": 64,
    "recording": True,
}
_ALSO: Mapping[type[msgspec.Struct], tuple[str, ...]] = {
    ChatBody: ("max_tokens",),
    CompletionBody: ("max_tokens",),
    TokenizeBody: ("prompt",),
    BatchBody: ("prompts",),
}

_UPLOAD = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "format": "binary", "description": "The content."},
        "purpose": {
            "enum": ["batch", "user_data", "assistants", "fine-tune", "vision", "evals"],
            "description": "What it is for; batches read files of purpose `batch`.",
        },
        "expires_after[anchor]": {"enum": ["created_at"], "description": "From when the time counts."},
        "expires_after[seconds]": {
            "type": "integer",
            "minimum": 3600,
            "maximum": 2_592_000,
            "description": "Time until the file is deleted.",
        },
    },
}


def register(app: QuartTrio, limits: LimitsConfig, model: str) -> None:
    """Add the endpoints; `model` is the name in the examples."""

    @cache
    def encoded() -> bytes:
        return msgspec.json.encode(document(limits, model))

    @app.get("/openapi.json")
    async def openapi() -> Response:
        return Response(await trio.to_thread.run_sync(encoded), content_type=_JSON)  # the first takes long to make

    ui.register(app)


def document(limits: LimitsConfig, model: str = "model") -> dict[str, Any]:
    """Return the OpenAPI document of a server with these limits; `model` is the name in the examples."""
    components = _components(operation.body for operation in OPERATIONS if operation.body is not None)
    for schema in components.values():
        _bound(schema.get("properties", {}), schema_bounds(limits))
    answers = _components(
        kind for one in OPERATIONS for kind in (*_types(one.answer), *_types(one.events), Error, AnthropicError)
    )
    assert components.keys().isdisjoint(answers), "a type of a request and one of an answer have the same name"
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation, model)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "trio-llm",
            "version": trio_llm.__version__,
            "description": "If the server has API keys, send one as `Authorization: Bearer <key>`.",
        },
        "tags": [{"name": name} for name in _TAGS],
        "paths": paths,
        "components": {
            "schemas": {**components, **answers},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        # A key is needed if the server has any.
        "security": [{}, {"key": []}],
    }


def _components(kinds: Iterable[type[msgspec.Struct]]) -> dict[str, Any]:
    """Return the schemas of types and of the types in their fields, by name."""
    _, components = msgspec.json.schema_components(dict.fromkeys(kinds), ref_template=_REF)
    describe(components)
    return components


def _types(events: type[msgspec.Struct] | UnionType | None) -> tuple[type[msgspec.Struct], ...]:
    return get_args(events) or ((events,) if isinstance(events, type) else ())


def _bound(properties: Mapping[str, Any], bounds: Mapping[str, Mapping[str, Any]]) -> None:
    """Add the limits from the settings to their fields."""
    for name in properties.keys() & bounds.keys():
        for form in properties[name].get("anyOf", [properties[name]]):
            kind = {"integer": "maximum", "array": "maxItems", "object": "maxProperties"}.get(form.get("type", ""))
            if kind in bounds[name]:
                form.update(bounds[name])


def _operation(operation: Operation, model: str) -> dict[str, Any]:
    name = re.sub(r"[^a-z0-9]+", "_", operation.path.lower()).strip("_")
    described: dict[str, Any] = {
        "operationId": f"{operation.method}_{name}",
        "summary": operation.summary,
        "tags": [_tag(operation.path)],
    }
    if parameters := _parameters(operation):
        described["parameters"] = parameters
    if operation.path == "/v1/files" and operation.method == "post":
        described["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": _UPLOAD}}}
    elif operation.body is not None:
        schema = {"$ref": _REF.format(name=operation.body.__name__)}
        content = {"schema": schema, "example": _example(operation.body, model)}
        described["requestBody"] = {"required": True, "content": {_JSON: content}}
    contents: dict[str, Any] = {media: _answer(operation, media) for media in operation.media}
    described["responses"] = {
        str(operation.status): {"description": "Done.", "content": contents},
        "default": {
            "description": "Refused or failed.",
            "content": {_JSON: {"schema": {"$ref": _REF.format(name=_error_name(operation.path))}}},
        },
    }
    return described


def _parameters(operation: Operation) -> list[dict[str, Any]]:
    parameters: list[dict[str, Any]] = [
        {
            "name": name,
            "in": "path",
            "required": True,
            "description": _PARAMETERS[name],
            "schema": {"type": "string", "minLength": 1},
        }
        for name in re.findall(r"\{(\w+)\}", operation.path)
    ]
    return parameters + [
        {"name": name, "in": "query", "description": _PARAMETERS[name], "schema": schema}
        for name, schema in operation.query.items()
    ]


def _tag(path: str) -> str:
    return next(tag for tag, prefixes in _TAGS.items() if path.startswith(prefixes))


def _example(body: type[msgspec.Struct], model: str) -> dict[str, Any]:
    """Return a valid example of a body."""
    required = {field.encode_name for field in msgspec.structs.fields(body) if field.required}
    example = {name: value for name, value in _EXAMPLES.items() if name in {*required, *_ALSO.get(body, ())}}
    return {"model": model, **example}


def _error_name(path: str) -> str:
    return "AnthropicError" if path.startswith("/v1/messages") else "Error"


def _answer(operation: Operation, media: str) -> dict[str, Any]:
    if media == _JSON and operation.answer is not None:
        schema: dict[str, Any] = {"$ref": _REF.format(name=operation.answer.__name__)}
        return {"schema": {"type": "array", "items": schema} if operation.listed else schema}
    if media == _JSON:
        return {"schema": {"type": "object", "required": list(operation.keys)}}
    return {"schema": _event(operation.events) if media == _EVENTS else {"type": "string"}}


def _event(data: type[msgspec.Struct] | UnionType | None) -> dict[str, Any]:
    """Describe each of the server-sent events: before OpenAPI 3.2 nothing else can tell what they are."""
    names = [kind.__name__ for kind in _types(data)]
    refs = [{"$ref": _REF.format(name=name)} for name in names]
    have_names = len(names) > 1
    last = "" if have_names else ", of the last one [DONE]"
    event = {
        "data": {
            "type": "string",
            "description": f"A {' or '.join(names)} in JSON{last}.",
            "contentMediaType": _JSON,
            "contentSchema": {"anyOf": refs} if have_names else refs[0],
        }
    }
    if have_names:
        event["event"] = {"type": "string", "description": "The type of the data."}
    return {"type": "object", "description": "A server-sent event.", "properties": event, "required": list(event)}
