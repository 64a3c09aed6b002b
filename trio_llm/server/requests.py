"""The bodies of requests: names and types. What the values may be is checked where they are used."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, cast

import msgspec
from msgspec import Meta, Struct

from trio_llm.errors import InvalidRequestError
from trio_llm.server.json_body import convert, parse_object

Metadata = Annotated[
    dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]], Meta(max_length=16)
]
CacheSalt = Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[^@/\\\x00-\x1f\x7f-\uffff]+$")]


class StreamOptions(Struct, kw_only=True):
    """What else a stream reports."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchemaFormat(Struct, kw_only=True, rename={"schema_": "schema"}):
    """The `json_schema` of a response_format."""

    name: str
    schema_: dict[str, Any] | bool | None = None
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(Struct, kw_only=True):
    """OpenAI's response_format."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(Struct, kw_only=True):
    """vLLM's structured_outputs: exactly one form, and how to write JSON."""

    json: str | dict[str, Any] | bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False


class GenerationBody(Struct, kw_only=True):
    """What chat and completions have in common. null is the same as absent, everywhere."""

    model: str | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=2)] | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=1024)] | None = None
    allowed_token_ids: Annotated[list[int], Meta(min_length=1)] | None = None
    bad_words: Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(max_length=128)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    best_of: int | None = None
    max_tokens: Annotated[int, Meta(ge=0)] | None = None
    min_tokens: Annotated[int, Meta(ge=0)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: Annotated[list[int], Meta(max_length=64)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: Annotated[int, Meta(ge=-1)] | None = None
    echo: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    add_special_tokens: bool | None = None
    priority: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    cache_salt: CacheSalt | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    # Names of the caller's own; they change nothing and are stored nowhere.
    user: Annotated[str, Meta(max_length=512)] | None = None
    metadata: Metadata | None = None


class CompletionBody(GenerationBody, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[Any]
    logprobs: Annotated[int, Meta(ge=-1)] | None = None


class ContentPart(Struct, kw_only=True):
    """A piece of a message; text is the only kind."""

    type: str
    text: str | None = None


class CalledFunction(Struct, kw_only=True):
    """What an earlier turn called; `arguments` is JSON text."""

    name: str
    arguments: str | dict[str, Any] = "{}"


class ToolCall(Struct, kw_only=True):
    """A call in an earlier turn of the assistant."""

    function: CalledFunction
    id: str | None = None
    type: Literal["function"] = "function"


class Message(Struct, kw_only=True, omit_defaults=True):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_call_id: str | None = None
    tool_calls: Annotated[list[ToolCall], Meta(max_length=128)] | None = None


class Function(Struct, kw_only=True, omit_defaults=True):
    """A function the model may call; `parameters` is the JSON schema of its arguments."""

    name: Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolDefinition(Struct, kw_only=True):
    """One of `tools`."""

    function: Function
    type: Literal["function"] = "function"


class FunctionName(Struct, kw_only=True):
    """The function of a named tool_choice."""

    name: str


class NamedToolChoice(Struct, kw_only=True):
    """tool_choice by name."""

    function: FunctionName
    type: Literal["function"] = "function"


class ChatBody(GenerationBody, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=2048)]
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=-1)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Annotated[list[ToolDefinition], Meta(min_length=1, max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high"] | None = None
    include_reasoning: bool | None = None


# Fields that clients know from elsewhere and that would change the answer: refused by name rather than ignored,
# except with the values that ask for nothing.
_NOT_SUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "functions": (),
    "function_call": ("none",),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "suffix": ("",),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "spaces_between_special_tokens": (True,),
    "thinking_token_budget": (),
    "documents": (),
    "chat_template": (),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "prompt_embeds": (),
    "logprob_token_ids": (),
    "repetition_detection": (),
    "stream_interval": (1,),
    "kv_transfer_params": (),
    "vllm_xargs": (),
}

Body = TypeVar("Body", bound=Struct)


def parse_body(data: bytes, kind: type[Body]) -> tuple[Body, tuple[str, ...]]:
    """Parse and check a request body; return it with the names of fields that nobody here knows.

    Raises:
        InvalidRequestError: Not JSON, or a field that is wrong, missing or not supported; names it.
    """
    given = {name: value for name, value in parse_object(data).items() if value is not None}
    body = check_body(given, kind)
    known = {field.name for field in msgspec.structs.fields(kind)}
    unknown = [name for name in given if name not in known and name not in _not_supported(kind)]
    if "stream_options" in known and isinstance(options := given.get("stream_options"), dict):
        known_options = {field.name for field in msgspec.structs.fields(StreamOptions)}
        unknown += [f"stream_options.{name}" for name in cast("dict[str, Any]", options) if name not in known_options]
    return body, tuple(unknown)


def check_body(value: Mapping[str, Any], kind: type[Body]) -> Body:
    """Check a parsed body. Raises InvalidRequestError, as `parse_body` does."""
    given = {name: item for name, item in value.items() if item is not None}
    refused = _not_supported(kind)
    for name in given.keys() & refused.keys():
        if given[name] not in refused[name]:
            raise InvalidRequestError(f"'{name}' is not supported by this server.", param=name)
    return convert(given, kind)


@cache
def _not_supported(kind: type[Struct]) -> Mapping[str, tuple[Any, ...]]:
    """Return the fields of a kind of body that are refused.

    An API that is not OpenAI's older one names its own as `not_supported`; there, fields of a chat are refused too.
    """
    own: Mapping[str, tuple[Any, ...]] | None = getattr(kind, "not_supported", None)
    if own is None:
        return _NOT_SUPPORTED
    chat = dict.fromkeys((field.name for field in msgspec.structs.fields(ChatBody)), ())
    known = {field.name for field in msgspec.structs.fields(kind)}
    return {name: values for name, values in {**_NOT_SUPPORTED, **chat, **own}.items() if name not in known}
