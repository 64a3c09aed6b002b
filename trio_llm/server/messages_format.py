"""Anthropic's message object, and the events that a streamed one is told by."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

import attrs

from trio_llm.engine import Delta, Stream
from trio_llm.server.errors import HttpError, anthropic_error_object
from trio_llm.server.generation import Head, UsageCounter
from trio_llm.server.parsing.message import MessageParser, MessageStyle
from trio_llm.server.parsing.pieces import CallArguments, CallStart, Content, Piece, Reasoning
from trio_llm.server.translation import new_id

Event = dict[str, Any]
_Kind = Literal["text", "thinking", "tool_use"]
# The type of a block's deltas, and the field that they grow by.
_DELTAS = {
    "text": ("text_delta", "text"),
    "thinking": ("thinking_delta", "thinking"),
    "tool_use": ("input_json_delta", "partial_json"),
}


@attrs.define
class _Block:
    """A content block that may still grow; its text is what is said or thought, or a call's input as JSON."""

    kind: _Kind
    index: int
    name: str = ""
    _id: str = attrs.field(factory=lambda: new_id("toolu"))
    _texts: list[str] = attrs.field(factory=list[str])

    def begin(self) -> Event:
        return {"type": "content_block_start", "index": self.index, "content_block": self.shown()}

    def grow(self, text: str) -> Event:
        self._texts.append(text)
        kind, field = _DELTAS[self.kind]
        return {"type": "content_block_delta", "index": self.index, "delta": {"type": kind, field: text}}

    def end(self) -> Event:
        return {"type": "content_block_stop", "index": self.index}

    def shown(self) -> dict[str, Any]:
        """Return the block as it stands."""
        text = "".join(self._texts)
        if self.kind == "text":
            return {"type": "text", "text": text, "citations": None}
        if self.kind == "thinking":
            return {"type": "thinking", "thinking": text, "signature": ""}
        return {"type": "tool_use", "id": self._id, "name": self.name, "input": _input(text)}


def _input(text: str) -> dict[str, Any]:
    """Return a call's input; one that was cut short, which the stop reason tells, is nothing anybody could use."""
    try:
        return json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}


class MessagesFormat:
    """Spells what the engine produces as a message; whole and streamed are the same blocks, kept or told."""

    def __init__(self, head: Head, stream: Stream, style: MessageStyle) -> None:
        self._head = head
        self._parser = MessageParser(style)
        self._counter = UsageCounter([stream], 1)
        self._begun = False
        self._open: _Block | None = None
        self._content: list[dict[str, Any]] = []
        self._stop: dict[str, str | None] = {"stop_reason": None, "stop_sequence": None}

    def answer(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        """Return the whole message."""
        for delta in deltas:
            self.chunks(0, delta)
        return self._message()

    def chunks(self, index: int, delta: Delta) -> Sequence[Event]:
        """Return the events for what the stream produced."""
        events: list[Event] = []
        if not self._begun:
            self._begun = True
            events += [{"type": "message_start", "message": self._message()}, {"type": "ping"}]
        self._counter.add(index, delta)
        pieces = self._parser.feed(delta.text)
        if delta.finish_reason is not None:
            pieces += self._parser.finish()
        for piece in pieces:
            events += self._add(piece)
        if delta.finish_reason is not None:
            events += self._close()
            self._stop = self._why(delta)
            events.append({"type": "message_delta", "delta": self._stop, "usage": self._usage()})
            events.append({"type": "message_stop"})
        return events

    def last_chunks(self) -> Sequence[Event]:
        """Return nothing: the last event went with the last delta."""
        return ()

    def error_chunks(self, error: HttpError) -> Sequence[Event]:
        """Return what ends a stream that fails."""
        return [anthropic_error_object(error)]

    def _add(self, piece: Piece) -> list[Event]:
        match piece:
            case Content():
                return self._grow("text", piece.text)
            case Reasoning():
                return self._grow("thinking", piece.text)
            case CallStart():
                return self._begin("tool_use", piece.name)
            case CallArguments():
                return self._grow("tool_use", piece.text)

    def _grow(self, kind: _Kind, text: str) -> list[Event]:
        begun = self._begin(kind) if self._open is None or self._open.kind != kind else []
        assert self._open is not None
        return [*begun, self._open.grow(text)]

    def _begin(self, kind: _Kind, name: str = "") -> list[Event]:
        closed = self._close()
        self._open = _Block(kind, len(self._content), name)
        return [*closed, self._open.begin()]

    def _close(self) -> list[Event]:
        block, self._open = self._open, None
        if block is None:
            return []
        self._content.append(block.shown())
        return [block.end()]

    def _why(self, delta: Delta) -> dict[str, str | None]:
        """Say why the message ends."""
        if isinstance(delta.stop_reason, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": delta.stop_reason}
        if delta.finish_reason == "length":
            return {"stop_reason": "max_tokens", "stop_sequence": None}
        return {"stop_reason": "tool_use" if self._parser.num_calls else "end_turn", "stop_sequence": None}

    def _message(self) -> dict[str, Any]:
        return {
            "id": self._head.id,
            "type": "message",
            "role": "assistant",
            "model": self._head.model,
            "content": list(self._content),
            **self._stop,
            "usage": self._usage(),
        }

    def _usage(self) -> dict[str, Any]:
        """Count as Anthropic does: the three kinds of input tokens add up to the prompt."""
        usage = self._counter.usage()
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": usage["prompt_tokens"] - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": usage["completion_tokens"],
        }
