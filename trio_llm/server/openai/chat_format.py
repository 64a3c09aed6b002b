"""OpenAI's chat answer and chunks, with reasoning and tool calls; one stream per choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import UNSET

from trio_llm.engine import Delta, Stream
from trio_llm.server.answers.completions import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    MadeCall,
    MadeFunction,
    MadeInput,
)
from trio_llm.server.bodies.types import ChatBody
from trio_llm.server.generation.history import new_call_id
from trio_llm.server.generation.respond import Head, StreamUsage, UsageCounter
from trio_llm.server.generation.timings import prompt_progress, timings
from trio_llm.server.http.sse import AnswerFormat
from trio_llm.server.openai.logprobs import TokenNames, chat_logprobs, prompt_logprobs
from trio_llm.server.parsing.message import MessageParser, MessageStyle
from trio_llm.server.parsing.pieces import CallArguments, CallStart, Content, Piece, Reasoning
from trio_llm.server.parsing.tools import ToolForm


class ChatFormat(AnswerFormat):
    """Formats the engine's deltas as chat completions."""

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
        self._form: ToolForm | None = style.tool_form
        self._parsers = [MessageParser(style) for _ in streams]
        self._begun = [False] * len(streams)
        self._is_custom = [False] * len(streams)  # Whether the last call of a stream is a custom tool's.
        self._counter = UsageCounter(streams, len(streams))
        self._usage = StreamUsage(body, self._counter)

    def answer(self, deltas: Sequence[Delta]) -> ChatCompletion:
        """Return the whole answer; `deltas` has one per stream."""
        choices: list[ChatChoice] = []
        for index, (delta, parser) in enumerate(zip(deltas, self._parsers, strict=True)):
            self._counter.add(index, delta)
            message = whole_message(parser.feed(delta.text) + parser.finish(), self._echo, self._form)
            choices.append(ChatChoice(index=index, message=message, **self._tokens(index, delta)))
        whole = ChatCompletion(**self._head.fields, choices=choices, usage=self._counter.usage(), **self._prompt)
        if self._body.timings_per_token:
            whole.timings = timings(self._streams, whole.usage)
        if self._body.prompt_logprobs is not None:
            whole.prompt_logprobs = prompt_logprobs(self._names, self._streams[0].prompt_logprobs or ())
        return whole

    def chunks(self, index: int, delta: Delta) -> Sequence[ChatCompletionChunk]:
        """Return the chunks for a delta of stream `index`."""
        if delta.progress is not None:
            chunk = self._chunk(ChatChunkChoice(index=index, delta=AssistantMessage()))
            chunk.prompt_progress = prompt_progress(self._streams[index], delta.progress)
            return [chunk]
        self._counter.add(index, delta)
        parser = self._parsers[index]
        chunks: list[ChatCompletionChunk] = []
        if not self._begun[index]:
            self._begun[index] = True
            opening = AssistantMessage(role="assistant", content=self._echo)
            chunks.append(self._chunk(ChatChunkChoice(index=index, delta=opening), **self._prompt))
        pieces = parser.feed(delta.text)
        if delta.finish_reason is not None:
            pieces += parser.finish()
        parts = [self._delta(index, piece) for piece in pieces]
        if not parts and (delta.finish_reason or self._body.logprobs or self._body.return_token_ids):
            parts.append(AssistantMessage())
        # Log-probabilities, ids and the finish reason go in the last chunk: they belong to the whole delta.
        chunks += [self._chunk(ChatChunkChoice(index=index, delta=part)) for part in parts[:-1]]
        if parts:
            chunks.append(self._chunk(ChatChunkChoice(index=index, delta=parts[-1], **self._tokens(index, delta))))
        return [self._usage.mark(chunk) for chunk in chunks]

    def last_chunks(self) -> Sequence[ChatCompletionChunk]:
        """Return the chunks after a successful end: the usage, if requested."""
        return self._usage.last_chunks(self._head, ChatCompletionChunk)

    def _chunk(self, choice: ChatChunkChoice, **prompt: Any) -> ChatCompletionChunk:
        return ChatCompletionChunk(**self._head.fields, choices=[choice], **prompt)

    def _delta(self, index: int, piece: Piece) -> AssistantMessage:
        match piece:
            case Content():
                return AssistantMessage(content=piece.text)
            case Reasoning():
                return AssistantMessage(reasoning=piece.text, reasoning_content=piece.text)
            case CallStart():
                self._is_custom[index] = piece.is_custom
                call = _call(piece, self._form)
                call.index = piece.index
                return AssistantMessage(tool_calls=[call])
            case CallArguments() if self._is_custom[index]:
                return AssistantMessage(tool_calls=[MadeCall(index=piece.index, custom=MadeInput(input=piece.text))])
            case CallArguments():
                part = MadeFunction(arguments=piece.text)
                return AssistantMessage(tool_calls=[MadeCall(index=piece.index, function=part)])

    def _tokens(self, index: int, delta: Delta) -> dict[str, Any]:
        """Return the token fields of a choice."""
        fields: dict[str, Any] = {}
        if delta.logprobs is not None:
            fields["logprobs"] = chat_logprobs(self._names, delta.logprobs)
        if delta.finish_reason is not None:
            calls = delta.finish_reason == "stop" and self._parsers[index].num_calls > 0
            fields["finish_reason"] = "tool_calls" if calls else delta.finish_reason
            fields["stop_reason"] = delta.stop_reason
        if self._body.return_token_ids:
            fields["token_ids"] = delta.token_ids
        return fields


def whole_message(pieces: Sequence[Piece], echo: str = "", form: ToolForm | None = None) -> AssistantMessage:
    """Return the assistant's message made of the pieces."""
    content = echo + "".join(piece.text for piece in pieces if isinstance(piece, Content))
    reasoning = "".join(piece.text for piece in pieces if isinstance(piece, Reasoning))
    calls = [_call(piece, form) for piece in pieces if isinstance(piece, CallStart)]
    for piece in pieces:
        if isinstance(piece, CallArguments):
            call = calls[piece.index]
            if call.custom:
                call.custom.input += piece.text
            elif call.function:
                call.function.arguments += piece.text
    return AssistantMessage(
        role="assistant",
        content=content if content or not calls else None,
        refusal=None,
        annotations=[],
        reasoning=reasoning or UNSET,
        reasoning_content=reasoning or UNSET,
        tool_calls=calls or UNSET,
    )


def _call(piece: CallStart, form: ToolForm | None) -> MadeCall:
    call_id = new_call_id(form)
    if piece.is_custom:
        return MadeCall(id=call_id, type="custom", custom=MadeInput(name=piece.name, input=""))
    return MadeCall(id=call_id, type="function", function=MadeFunction(name=piece.name, arguments=""))
