"""Answers of /v1/messages: Anthropic's message, and the events of a streamed one."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import UNSET, UnsetType

from trio_llm.server.answers.base import Answer


class TokenCount(Answer, kw_only=True):
    """Size of a conversation.

    Attributes:
        input_tokens: Tokens of the prompt that it becomes.
    """

    input_tokens: int


class MessageUsage(Answer, kw_only=True):
    """Tokens of a message. The three kinds of input tokens add up to the prompt.

    Attributes:
        input_tokens: Prompt tokens that were computed.
        cache_creation_input_tokens: Always 0: every prompt is cached, at no cost.
        cache_read_input_tokens: Prompt tokens that came from the prefix cache.
        output_tokens: Tokens of the answer.
        cache_creation: Always null.
        inference_geo: Always null.
        output_tokens_details: Always null.
        server_tool_use: Always null: the server runs no tools.
        service_tier: Always "standard".
    """

    input_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int
    output_tokens: int
    cache_creation: None = None
    inference_geo: None = None
    output_tokens_details: None = None
    server_tool_use: None = None
    service_tier: Literal["standard"] = "standard"


class DirectCaller(Answer, kw_only=True):
    """Who made a call.

    Attributes:
        type: Always "direct": the model itself.
    """

    type: Literal["direct"] = "direct"


class SaidBlock(Answer, kw_only=True):
    """A block of text, of thinking, or a tool call; which fields it has depends on its type.

    Attributes:
        type: What the block is.
        text: Of a text, what the model says.
        citations: Of a text, always empty.
        thinking: Of thinking, its text.
        signature: Of thinking, always empty.
        id: Of a call, its name, to give back as `tool_use_id` with its result.
        name: Of a call, the tool.
        input: Of a call, its arguments; empty for a call that was cut short.
        caller: Of a call, who made it.
    """

    type: Literal["text", "thinking", "tool_use"]
    text: str | UnsetType = UNSET
    citations: list[None] | UnsetType = UNSET
    thinking: str | UnsetType = UNSET
    signature: str | UnsetType = UNSET
    id: str | UnsetType = UNSET
    name: str | UnsetType = UNSET
    input: dict[str, Any] | UnsetType = UNSET
    caller: DirectCaller | UnsetType = UNSET


StopReason = Literal["end_turn", "max_tokens", "pause_turn", "stop_sequence", "tool_use"]


class AnthropicMessage(Answer, kw_only=True):
    """A message in Anthropic's form.

    Attributes:
        id: New for each message.
        type: Type of the object.
        role: Always "assistant".
        model: Served name of the model.
        content: What the model thinks, says and calls, in order.
        stop_reason: Why it ended; null at the start of a stream.
        stop_sequence: The stop sequence that ended it.
        stop_details: Always null.
        container: Always null.
        usage: Tokens of the message.
    """

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[SaidBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    stop_details: None = None
    container: None = None
    usage: MessageUsage


class MessageStart(Answer, kw_only=True):
    """The first event of a stream.

    Attributes:
        type: Name of the event.
        message: The message, without content.
    """

    type: Literal["message_start"] = "message_start"
    message: AnthropicMessage


class Ping(Answer, kw_only=True):
    """An event that says nothing.

    Attributes:
        type: Name of the event.
    """

    type: Literal["ping"] = "ping"


class BlockStart(Answer, kw_only=True):
    """A block begins.

    Attributes:
        type: Name of the event.
        index: Which block of the content.
        content_block: The block, without text.
    """

    type: Literal["content_block_start"] = "content_block_start"
    index: int
    content_block: SaidBlock


class BlockGrowth(Answer, kw_only=True):
    """What was added to a block; which field it has depends on its type.

    Attributes:
        type: What was added.
        text: Of a text.
        thinking: Of thinking.
        partial_json: Of the input of a call, as JSON.
    """

    type: Literal["text_delta", "thinking_delta", "input_json_delta"]
    text: str | UnsetType = UNSET
    thinking: str | UnsetType = UNSET
    partial_json: str | UnsetType = UNSET


class BlockDelta(Answer, kw_only=True):
    """A block grows.

    Attributes:
        type: Name of the event.
        index: Which block of the content.
        delta: What was added.
    """

    type: Literal["content_block_delta"] = "content_block_delta"
    index: int
    delta: BlockGrowth


class BlockStop(Answer, kw_only=True):
    """A block is complete.

    Attributes:
        type: Name of the event.
        index: Which block of the content.
    """

    type: Literal["content_block_stop"] = "content_block_stop"
    index: int


class MessageEnd(Answer, kw_only=True):
    """Why a message ended.

    Attributes:
        stop_reason: Why it ended.
        stop_sequence: The stop sequence that ended it.
        stop_details: Always null.
        container: Always null.
    """

    stop_reason: StopReason | None
    stop_sequence: str | None
    stop_details: None = None
    container: None = None


class MessageDelta(Answer, kw_only=True):
    """The message is complete.

    Attributes:
        type: Name of the event.
        delta: Why it ended.
        usage: Tokens of the message.
    """

    type: Literal["message_delta"] = "message_delta"
    delta: MessageEnd
    usage: MessageUsage


class MessageStop(Answer, kw_only=True):
    """The last event of a stream.

    Attributes:
        type: Name of the event.
    """

    type: Literal["message_stop"] = "message_stop"


MessageEvent = MessageStart | Ping | BlockStart | BlockDelta | BlockStop | MessageDelta | MessageStop
