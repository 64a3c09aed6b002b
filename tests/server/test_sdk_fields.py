"""Every field that the vendors' own clients can send is decided on: it is known, or refused by its name.

The fields come from the types of the installed SDKs: one that a new version adds fails here until somebody decides.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import msgspec
import pytest
from anthropic import types as anthropic
from openai.types import chat, completion_create_params, embedding_create_params, responses, shared_params
from openai.types.chat import completion_create_params as chat_params
from openai.types.responses import response_create_params, response_input_param

from trio_llm.server.anthropic import body as messages_body
from trio_llm.server.bodies import tools
from trio_llm.server.bodies import types as requests
from trio_llm.server.bodies.foreign_fields import hinted_fields, unsupported_fields
from trio_llm.server.bodies.unknown_fields import hints, not_supported
from trio_llm.server.openai import responses_body, responses_tools
from trio_llm.server.openai.embeddings import EmbeddingBody


def fields_of(typed: Any) -> Iterator[str]:
    """Yield the keys of a TypedDict, or of all of a union."""
    if get_origin(typed) in (Union, UnionType):
        for option in get_args(typed):
            yield from fields_of(option)
    elif hasattr(typed, "__total__"):
        yield from get_type_hints(typed)


def decided(kind: type[msgspec.Struct]) -> set[str]:
    """Return the fields that a kind of object has, and those that it refuses by name."""
    config = kind.__struct_config__
    known = {field.encode_name for field in msgspec.structs.fields(kind)}
    return known | {config.tag_field or "type", *not_supported(kind), *hints(kind)}


BODIES = [
    (requests.ChatBody, chat_params.CompletionCreateParams),
    (requests.CompletionBody, completion_create_params.CompletionCreateParams),
    (responses_body.ResponsesBody, response_create_params.ResponseCreateParams),
    (EmbeddingBody, embedding_create_params.EmbeddingCreateParams),
    (messages_body.MessagesBody, anthropic.message_create_params.MessageCreateParams),
    (messages_body.CountTokensBody, anthropic.MessageCountTokensParams),
]
NESTED = [
    (requests.Message, chat.ChatCompletionMessageParam),
    (requests.ContentPart, chat.ChatCompletionContentPartTextParam),
    (tools.ToolCall, chat.ChatCompletionMessageToolCallUnionParam),
    (tools.ToolDefinition, chat.ChatCompletionToolUnionParam),
    (tools.Function, shared_params.FunctionDefinition),
    (tools.Custom, chat.chat_completion_custom_tool_param.Custom),
    (tools.Grammar, chat.chat_completion_custom_tool_param.CustomFormatGrammarGrammar),
    (tools.NamedToolChoice, chat.ChatCompletionToolChoiceOptionParam),
    (tools.AllowedTools, chat.ChatCompletionAllowedToolsParam),
    (requests.StreamOptions, chat.ChatCompletionStreamOptionsParam),
    (requests.ResponseFormat, shared_params.ResponseFormatJSONSchema),
    (requests.JsonSchemaFormat, shared_params.response_format_json_schema.JSONSchema),
    (responses_body.InputItem, responses.EasyInputMessageParam),
    (responses_body.InputItem, responses.ResponseOutputMessageParam),
    (responses_body.InputItem, responses.ResponseFunctionToolCallParam),
    (responses_body.InputItem, responses.ResponseReasoningItemParam),
    (responses_body.InputItem, response_input_param.FunctionCallOutput),
    (responses_body.InputPart, responses.ResponseInputTextParam),
    (responses_body.InputPart, responses.response_output_text_param.ResponseOutputTextParam),
    (responses_body.InputPart, responses.response_output_refusal_param.ResponseOutputRefusalParam),
    (responses_tools.FunctionTool, responses.FunctionToolParam),
    (responses_tools.CustomTool, responses.CustomToolParam),
    (responses_tools.NamespaceTool, responses.NamespaceToolParam),
    (responses_body.InputItem, responses.ResponseCustomToolCallParam),
    (responses_body.InputItem, responses.ResponseFunctionWebSearchParam),
    (responses_body.InputItem, response_input_param.McpListTools),
    (responses_body.AllowedChoice, responses.ToolChoiceAllowedParam),
    (responses_body.InputItem, responses.ResponseCustomToolCallOutputParam),
    (responses_body.TextConfig, responses.ResponseTextConfigParam),
    (responses_body.TextFormat, responses.ResponseFormatTextJSONSchemaConfigParam),
    (responses_body.ReasoningConfig, shared_params.Reasoning),
    (messages_body.Turn, anthropic.MessageParam),
    (messages_body.TextBlock, anthropic.TextBlockParam),
    (messages_body.ServerToolUseBlock, anthropic.ServerToolUseBlockParam),
    (messages_body.WebSearchBlock, anthropic.WebSearchToolResultBlockParam),
    (messages_body.ThinkingBlock, anthropic.ThinkingBlockParam),
    (messages_body.ToolUseBlock, anthropic.ToolUseBlockParam),
    (messages_body.ToolResultBlock, anthropic.ToolResultBlockParam),
    (messages_body.ToolParam, anthropic.ToolParam),
    (messages_body.ToolChoice, anthropic.ToolChoiceToolParam),
    (messages_body.Thinking, anthropic.ThinkingConfigEnabledParam),
    (messages_body.OutputConfig, anthropic.OutputConfigParam),
    (messages_body.OutputFormat, anthropic.JSONOutputFormatParam),
]


@pytest.mark.parametrize(("kind", "typed"), BODIES, ids=lambda value: getattr(value, "__name__", ""))
def test_every_field_of_a_request_is_decided_on(kind: type[msgspec.Struct], typed: Any) -> None:
    """What a client's request can say at its top level is known, or refused by name."""
    sent = set(fields_of(typed))
    assert sent
    known = {field.name for field in msgspec.structs.fields(kind)}
    assert sent - known - {*unsupported_fields(kind), *hinted_fields(kind)} == set()


@pytest.mark.parametrize(("kind", "typed"), NESTED, ids=lambda value: getattr(value, "__name__", ""))
def test_every_field_inside_a_request_is_decided_on(kind: type[msgspec.Struct], typed: Any) -> None:
    """So is what it can say further in."""
    sent = set(fields_of(typed))
    assert sent
    assert sent - decided(kind) == set()
