"""Anthropic's message, and the events of a streamed one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from trio_llm.engine import Delta, Stream
from trio_llm.server.answers import messages as answers
from trio_llm.server.answers.errors import AnthropicError
from trio_llm.server.answers.messages import BlockGrowth, MessageEvent, SaidBlock
from trio_llm.server.bodies.error_fields import new_id
from trio_llm.server.errors import HttpError, anthropic_error_object
from trio_llm.server.generation.parts import Part, Parts
from trio_llm.server.generation.respond import Head, UsageCounter
from trio_llm.server.http.sse import AnswerFormat
from trio_llm.server.parsing.message import MessageParser, MessageStyle


class _Blocks:
    """Converts parts to content blocks.

    Attributes:
        done: The complete blocks.
    """

    def __init__(self) -> None:
        self.done: list[SaidBlock] = []
        self._id = ""

    def begin(self, part: Part) -> list[MessageEvent]:
        self._id = new_id("toolu")
        return [answers.BlockStart(index=part.index, content_block=self._block(part))]

    def grow(self, part: Part, text: str) -> list[MessageEvent]:
        return [answers.BlockDelta(index=part.index, delta=_growth(part, text))]

    def end(self, part: Part, *, cut_short: bool) -> list[MessageEvent]:  # noqa: ARG002 - the stop reason says it
        self.done.append(self._block(part))
        return [answers.BlockStop(index=part.index)]

    def _block(self, part: Part) -> SaidBlock:
        match part.kind:
            case "text":
                # Anthropic's types demand the field; Vercel's AI SDK refuses null, which Anthropic's allow.
                return SaidBlock(type="text", text=part.text, citations=[])
            case "reasoning":
                return SaidBlock(type="thinking", thinking=part.text, signature="")
            case "call":
                caller = answers.DirectCaller()
                return SaidBlock(type="tool_use", id=self._id, name=part.name, input=_input(part.text), caller=caller)


def _growth(part: Part, text: str) -> BlockGrowth:
    match part.kind:
        case "text":
            return BlockGrowth(type="text_delta", text=text)
        case "reasoning":
            return BlockGrowth(type="thinking_delta", thinking=text)
        case "call":
            return BlockGrowth(type="input_json_delta", partial_json=text)


def _input(text: str) -> dict[str, Any]:
    """Return a call's input; empty for a call that was cut short, as the stop reason tells."""
    try:
        return json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}


class MessagesFormat(AnswerFormat):
    """Formats the engine's deltas as a message, whole or as a stream of events."""

    events_have_names = True

    def __init__(self, head: Head, stream: Stream, style: MessageStyle) -> None:
        self._head = head
        self._parser = MessageParser(style)
        self._counter = UsageCounter([stream], 1)
        self._begun = False
        self._blocks = _Blocks()
        self._parts = Parts(self._blocks)
        self._end = answers.MessageEnd(stop_reason=None, stop_sequence=None)

    def answer(self, deltas: Sequence[Delta]) -> answers.AnthropicMessage:
        """Return the whole message."""
        for delta in deltas:
            self.chunks(0, delta)
        return self._message()

    def chunks(self, index: int, delta: Delta) -> Sequence[MessageEvent]:
        """Return the events for a delta of the stream."""
        events: list[MessageEvent] = []
        if not self._begun:
            self._begun = True
            events += [answers.MessageStart(message=self._message()), answers.Ping()]
        self._counter.add(index, delta)
        pieces = self._parser.feed(delta.text)
        if delta.finish_reason is not None:
            pieces += self._parser.finish()
        events += self._parts.add(pieces)
        if delta.finish_reason is not None:
            events += self._parts.end(cut_short=delta.cut_short)
            self._end = self._why(delta)
            events += [answers.MessageDelta(delta=self._end, usage=self._usage()), answers.MessageStop()]
        return events

    def error_chunks(self, error: HttpError) -> Sequence[AnthropicError]:
        """Return the events that end a failed stream."""
        return [anthropic_error_object(error)]

    def _why(self, delta: Delta) -> answers.MessageEnd:
        """Return why the message ends."""
        if isinstance(delta.stop_reason, str):
            return answers.MessageEnd(stop_reason="stop_sequence", stop_sequence=delta.stop_reason)
        if delta.finish_reason == "length":
            return answers.MessageEnd(stop_reason="max_tokens", stop_sequence=None)
        if delta.finish_reason == "abort":
            return answers.MessageEnd(stop_reason="pause_turn", stop_sequence=None)
        return answers.MessageEnd(stop_reason="tool_use" if self._parser.num_calls else "end_turn", stop_sequence=None)

    def _message(self) -> answers.AnthropicMessage:
        return answers.AnthropicMessage(
            id=self._head.id,
            model=self._head.model,
            content=list(self._blocks.done),
            stop_reason=self._end.stop_reason,
            stop_sequence=self._end.stop_sequence,
            usage=self._usage(),
        )

    def _usage(self) -> answers.MessageUsage:
        usage = self._counter.usage()
        cached = usage.prompt_tokens_details.cached_tokens
        return answers.MessageUsage(
            input_tokens=usage.prompt_tokens - cached,
            cache_read_input_tokens=cached,
            output_tokens=usage.completion_tokens,
        )
