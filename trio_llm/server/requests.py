"""The bodies of requests: names and types. What the values may be is checked where they are used."""

from __future__ import annotations

from collections.abc import Mapping
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


class Message(Struct, kw_only=True, omit_defaults=True):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[Any] | None = None
    function_call: Any = None


class ChatBody(GenerationBody, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=2048)]
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=-1)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


# Fields that clients know from elsewhere and that would change the answer: refused by name rather than ignored,
# except with the values that ask for nothing.
_NOT_SUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "tools": (),
    "tool_choice": ("none",),
    "functions": (),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "suffix": ("",),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "spaces_between_special_tokens": (True,),
    "reasoning_effort": (),
    "include_reasoning": (),
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
    known = {field.name for field in msgspec.structs.fields(kind)}
    for name in given.keys() & _NOT_SUPPORTED.keys():
        if given[name] not in _NOT_SUPPORTED[name]:
            raise InvalidRequestError(f"'{name}' is not supported by this server.", param=name)
    unknown = [name for name in given if name not in known and name not in _NOT_SUPPORTED]
    if isinstance(options := given.get("stream_options"), dict):
        known_options = {field.name for field in msgspec.structs.fields(StreamOptions)}
        unknown += [f"stream_options.{name}" for name in cast("dict[str, Any]", options) if name not in known_options]
    return convert(given, kind), tuple(unknown)
