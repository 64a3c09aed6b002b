"""OpenAI's chat answer and chunks, with reasoning and tool calls; one stream per choice."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from trio_llm.engine import Delta, Stream
from trio_llm.server.generation import Head, StreamUsage, UsageCounter
from trio_llm.server.logprobs import TokenNames, chat_logprobs, prompt_logprobs
from trio_llm.server.parsing.message import MessageParser, MessageStyle
from trio_llm.server.parsing.pieces import CallArguments, CallStart, Content, Piece, Reasoning
from trio_llm.server.requests import ChatBody

_KIND = "chat.completion"
_CHUNK_KIND = "chat.completion.chunk"


class ChatFormat:
    """Spells what the engine produces as chat completions."""

    def __init__(
        self,
        head: Head,
        body: ChatBody,
        streams: Sequence[Stream],
        names: TokenNames,
        style: MessageStyle,
        echo: str,
        prompt: Mapping[str, Any],
    ) -> None:
        self._head = head
        self._body = body
        self._streams = streams
        self._names = names
        self._echo = echo
        self._prompt = prompt
        self._parsers = [MessageParser(style) for _ in streams]
        self._begun = [False] * len(streams)
        self._counter = UsageCounter(streams, len(streams))
        self._usage = StreamUsage(body, self._counter)

    def answer(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        """Return the whole answer; `deltas` has one per stream."""
        choices: list[dict[str, Any]] = []
        for index, (delta, parser) in enumerate(zip(deltas, self._parsers, strict=True)):
            self._counter.add(index, delta)
            message = whole_message(parser.feed(delta.text) + parser.finish(), self._echo)
            choices.append(self._choice(index, "message", message, delta))
        whole = {**self._head.chunk(_KIND, choices), "usage": self._counter.usage()}
        if self._body.prompt_logprobs is not None:
            whole["prompt_logprobs"] = prompt_logprobs(self._names, self._streams[0].prompt_logprobs or ())
        return {**whole, **self._prompt}

    def chunks(self, index: int, delta: Delta) -> Sequence[dict[str, Any]]:
        """Return the chunks for what stream `index` produced."""
        self._counter.add(index, delta)
        parser = self._parsers[index]
        chunks: list[dict[str, Any]] = []
        if not self._begun[index]:
            self._begun[index] = True
            chunks.append(self._opening(index))
        pieces = parser.feed(delta.text)
        if delta.finish_reason is not None:
            pieces += parser.finish()
        parts = [_delta(piece) for piece in pieces]
        if not parts and (delta.finish_reason or self._body.logprobs or self._body.return_token_ids):
            parts.append({})
        # Logprobs, ids and the end go with the last part: they belong to the tokens, not to how the text splits.
        chunks += [self._head.chunk(_CHUNK_KIND, [_choice(index, "delta", part)]) for part in parts[:-1]]
        if parts:
            chunks.append(self._head.chunk(_CHUNK_KIND, [self._choice(index, "delta", parts[-1], delta)]))
        return [self._usage.mark(chunk) for chunk in chunks]

    def last_chunks(self) -> Sequence[dict[str, Any]]:
        """Return what follows a good end: the usage, if it was asked for."""
        return self._usage.last_chunks(self._head, _CHUNK_KIND)

    def _opening(self, index: int) -> dict[str, Any]:
        opening = _choice(index, "delta", {"role": "assistant", "content": self._echo})
        return {**self._head.chunk(_CHUNK_KIND, [opening]), **self._prompt}

    def _choice(self, index: int, key: str, content: dict[str, Any], delta: Delta) -> dict[str, Any]:
        choice = _choice(index, key, content)
        if delta.logprobs is not None:
            choice["logprobs"] = chat_logprobs(self._names, delta.logprobs)
        if delta.finish_reason is not None:
            calls = delta.finish_reason == "stop" and self._parsers[index].num_calls > 0
            choice["finish_reason"] = "tool_calls" if calls else delta.finish_reason
            choice["stop_reason"] = delta.stop_reason
        if self._body.return_token_ids:
            choice["token_ids"] = delta.token_ids
        return choice


def whole_message(pieces: Sequence[Piece], echo: str = "") -> dict[str, Any]:
    """Return the assistant's message that pieces add up to."""
    content = echo + "".join(piece.text for piece in pieces if isinstance(piece, Content))
    reasoning = "".join(piece.text for piece in pieces if isinstance(piece, Reasoning))
    calls = [_call(piece) for piece in pieces if isinstance(piece, CallStart)]
    for piece in pieces:
        if isinstance(piece, CallArguments):
            calls[piece.index]["function"]["arguments"] += piece.text
    message: dict[str, Any] = {"role": "assistant", "content": content if content or not calls else None}
    message["refusal"] = None
    if reasoning:
        message |= _reasoning(reasoning)
    if calls:
        message["tool_calls"] = calls
    return message


def _delta(piece: Piece) -> dict[str, Any]:
    match piece:
        case Content():
            return {"content": piece.text}
        case Reasoning():
            return _reasoning(piece.text)
        case CallStart():
            return {"tool_calls": [{"index": piece.index, **_call(piece)}]}
        case CallArguments():
            return {"tool_calls": [{"index": piece.index, "function": {"arguments": piece.text}}]}


def _reasoning(text: str) -> dict[str, Any]:
    # Clients know it by one or the other of two names.
    return {"reasoning": text, "reasoning_content": text}


def _call(piece: CallStart) -> dict[str, Any]:
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": piece.name, "arguments": ""},
    }


def _choice(index: int, key: str, content: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, key: content, "logprobs": None, "finish_reason": None}
