"""The bodies of requests: names and types. What the values may be is checked where they are used."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from trio_llm.config import LimitsConfig
from trio_llm.errors import InvalidRequestError
from trio_llm.server.amounts import check_amounts, unknown_field
from trio_llm.server.fields import NotSupported, Stray, stray_fields
from trio_llm.server.json_body import convert, parse_object

logger = logging.getLogger(__name__)

Metadata = dict[str, str]
CallersName = Annotated[str, Meta(max_length=512)]
RequestId = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
CacheSalt = Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[^@/\\\x00-\x1f\x7f-\uffff]+$")]


class StreamOptions(Struct, kw_only=True):
    """What else a stream reports."""

    not_supported: ClassVar[NotSupported] = {"include_obfuscation": (False,)}

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

    not_supported: ClassVar[NotSupported] = {
        "structural_tag": (),
        "whitespace_pattern": (),
        "disable_additional_properties": (False,),
        "disable_fallback": (False, True),  # There is one backend: it falls back to none.
    }

    json: str | dict[str, Any] | bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False


class RepetitionDetection(Struct, kw_only=True):
    """vLLM's repetition_detection: end an answer whose last tokens are a pattern that came `min_count` times."""

    max_pattern_size: Annotated[int, Meta(ge=1, le=256)]
    min_count: Annotated[int, Meta(ge=2, le=2**31)]
    min_pattern_size: Annotated[int, Meta(ge=0, le=256)] | None = None


class GenerationBody(Struct, kw_only=True):
    """What chat and completions have in common. null is the same as absent, everywhere."""

    model: str | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0)] | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    allowed_token_ids: Annotated[list[int], Meta(min_length=1)] | None = None
    bad_words: Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(max_length=128)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    n: Annotated[int, Meta(ge=1)] | None = None
    best_of: int | None = None
    max_tokens: Annotated[int, Meta(ge=0)] | None = None
    min_tokens: Annotated[int, Meta(ge=0)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    logprob_token_ids: Annotated[list[int], Meta(max_length=128)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: Annotated[int, Meta(ge=-1)] | None = None
    repetition_detection: RepetitionDetection | None = None
    echo: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stream_interval: Annotated[int, Meta(ge=1)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    add_special_tokens: bool | None = None
    priority: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    cache_salt: CacheSalt | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    return_prompt_text: bool | None = None
    request_id: RequestId | None = None
    # Names of the caller's own; they change nothing and are stored nowhere.
    user: CallersName | None = None
    safety_identifier: CallersName | None = None
    prompt_cache_key: CallersName | None = None
    session_id: CallersName | None = None
    metadata: Metadata | None = None


class CompletionBody(GenerationBody, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[Any]
    logprobs: Annotated[int, Meta(ge=-1)] | None = None


class ContentPart(Struct, kw_only=True):
    """A piece of a message; text is the only kind. Where a prompt's cache may end is a hint: all of it is cached."""

    type: str
    text: str | None = None
    prompt_cache_breakpoint: dict[str, Any] | None = None


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

    not_supported: ClassVar[NotSupported] = {"audio": (), "function_call": (), "annotations": ([],)}

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    refusal: str | None = None
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

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=-1)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Annotated[list[ToolDefinition], Meta(min_length=1, max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Effort | None = None
    include_reasoning: bool | None = None
    thinking_token_budget: Annotated[int, Meta(ge=0)] | None = None
    documents: Annotated[list[dict[str, Any]], Meta(min_length=1)] | None = None


# Fields that clients know from elsewhere and that would change the answer: refused by name rather than ignored,
# except with the values that ask for nothing.
_NOT_SUPPORTED: NotSupported = {
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
    "documents": (),
    "chat_template": (),
    "thinking_token_budget": (),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "moderation": (),
    "verbosity": ("medium",),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "prompt_cache_options": (),
    "prompt_cache_retention": ("in_memory",),
    "prompt_embeds": (),
    "mm_processor_kwargs": ({},),
    "media_io_kwargs": ({},),
    "kv_transfer_params": (),
    "vllm_xargs": (),
}

Body = TypeVar("Body", bound=Struct)


def parse_body(data: bytes, kind: type[Body], limits: LimitsConfig) -> tuple[Body, tuple[str, ...]]:
    """Parse and check a request body; return it with the paths of fields that nobody here knows.

    Raises:
        InvalidRequestError: Not JSON, or a field that is wrong, missing or not supported; names it.
    """
    given = _given(parse_object(data, limits))
    strays = _checked_strays(given, kind, limits)
    return _checked(given, kind, limits), tuple(stray.path for stray in strays)


def check_body(value: Mapping[str, Any], kind: type[Body], limits: LimitsConfig) -> Body:
    """Check a parsed body, a line of a batch. Raises InvalidRequestError, as `parse_body` does.

    Whoever sent it is not there to be told of fields that nobody knows: the log has them.
    """
    given = _given(value)
    if strays := _checked_strays(given, kind, limits):
        logger.info("ignored unknown fields of a line: %r", [stray.path[:64] for stray in strays[:10]])
    return _checked(given, kind, limits)


def _checked(given: Mapping[str, Any], kind: type[Body], limits: LimitsConfig) -> Body:
    body = convert(given, kind)
    check_amounts(body, limits)
    return body


def _given(value: Mapping[str, Any]) -> dict[str, Any]:
    return {name: item for name, item in value.items() if item is not None}


def _checked_strays(given: Mapping[str, Any], kind: type[Struct], limits: LimitsConfig) -> Sequence[Stray]:
    """Refuse the first field that asks for what is not supported; return those that nobody knows."""
    strays = stray_fields(given, kind, _not_supported(kind))
    for stray in strays:
        if stray.refused:
            raise InvalidRequestError(f"'{stray.path}' is not supported by this server.", param=stray.path)
    if strays and limits.strict:
        raise unknown_field(strays[0].path)
    return strays


@cache
def _not_supported(kind: type[Struct]) -> NotSupported:
    """Return the fields of a kind of body that are refused.

    An API that is not OpenAI's older one names its own as `not_supported`; there, fields of a chat are refused too.
    """
    own: NotSupported | None = getattr(kind, "not_supported", None)
    if own is None:
        return _NOT_SUPPORTED
    chat = dict.fromkeys((field.name for field in msgspec.structs.fields(ChatBody)), ())
    return {**_NOT_SUPPORTED, **chat, **own}
