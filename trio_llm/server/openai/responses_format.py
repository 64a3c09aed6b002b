"""OpenAI's response object, and the events of a streamed one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from trio_llm.engine import Delta, Stream
from trio_llm.messages import SamplingParams
from trio_llm.server.answers import responses as answers
from trio_llm.server.answers.base import ReasoningTokens
from trio_llm.server.answers.responses import Event, ModelResponse, ResponseEvent
from trio_llm.server.errors import HttpError
from trio_llm.server.generation.parts import Parts
from trio_llm.server.generation.respond import Head, UsageCounter
from trio_llm.server.http.sse import AnswerFormat
from trio_llm.server.openai.responses_body import ResponsesBody
from trio_llm.server.openai.responses_items import OutputItems
from trio_llm.server.parsing.message import MessageParser, MessageStyle
from trio_llm.server.parsing.reasoning import count_reasoning_tokens
from trio_llm.tokenizer import Tokenizer


class ResponsesFormat(AnswerFormat):
    """Formats the engine's deltas as a response, whole or as a stream of events."""

    events_have_names = True

    def __init__(
        self,
        head: Head,
        body: ResponsesBody,
        params: SamplingParams,
        stream: Stream,
        style: MessageStyle,
        tokenizer: Tokenizer,
        items: OutputItems,
    ) -> None:
        self._head = head
        self._body = body
        self._params = params
        self._tokenizer = tokenizer
        self._style = style
        self._parser = MessageParser(style)
        self._items = items
        self._parts = Parts(self._items)
        self._counter = UsageCounter([stream], 1)
        self._token_ids: list[int] = []
        self._status: answers.ResponseStatus = "in_progress"
        self._incomplete_details: answers.IncompleteDetails | None = None
        self._num_events = 0

    def answer(self, deltas: Sequence[Delta]) -> ModelResponse:
        """Return the whole response."""
        for delta in deltas:
            self.chunks(0, delta)
        return self._response()

    def chunks(self, index: int, delta: Delta) -> Sequence[Event]:
        """Return the events for a delta of the stream."""
        events: list[Event] = []
        if not self._num_events:
            events += [self._response_event("response.created"), self._response_event("response.in_progress")]
        self._counter.add(index, delta)
        self._token_ids += delta.token_ids
        pieces = self._parser.feed(delta.text)
        if delta.finish_reason is not None:
            pieces += self._parser.finish()
        events += self._parts.add(pieces)
        if delta.finish_reason is not None:
            events += self._finish(delta)
        return self._numbered(events)

    def error_chunks(self, error: HttpError) -> Sequence[Event]:
        """Return the events that end a failed stream."""
        self._status = "failed"
        failed = self._response_event("response.failed")
        failed.response.error = answers.ResponseFault(message=error.message)
        return self._numbered([failed])

    def _finish(self, last: Delta) -> list[Event]:
        """End the last item. An empty answer gets an empty message, since clients expect one."""
        begun = [] if self._parts.num_parts else self._parts.begin("text")
        ended = self._parts.end(cut_short=last.cut_short)
        self._status = "incomplete" if last.cut_short else "completed"
        if last.finish_reason == "length":
            self._incomplete_details = answers.IncompleteDetails()
        return [*begun, *ended, self._response_event("response.incomplete" if last.cut_short else "response.completed")]

    def _numbered(self, events: list[Event]) -> list[Event]:
        for event in events:
            event.sequence_number = self._num_events
            self._num_events += 1
        return events

    def _response_event(
        self,
        kind: Literal[
            "response.created", "response.in_progress", "response.completed", "response.incomplete", "response.failed"
        ],
    ) -> ResponseEvent:
        return ResponseEvent(type=kind, response=self._response())

    def _response(self) -> ModelResponse:
        body, params = self._body, self._params
        return ModelResponse(
            id=self._head.id,
            created_at=self._head.created,
            completed_at=int(time.time()) if self._status == "completed" else None,
            status=self._status,
            incomplete_details=self._incomplete_details,
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            metadata=body.metadata or {},
            model=self._head.model,
            output=list(self._items.done),
            parallel_tool_calls=body.parallel_tool_calls is not False,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            prompt_cache_key=body.prompt_cache_key,
            reasoning=answers.UsedReasoning(effort=body.reasoning.effort if body.reasoning else None),
            safety_identifier=body.safety_identifier,
            temperature=params.temperature,
            text={"format": _echo(body.text.format) if body.text and body.text.format else {"type": "text"}},
            tool_choice=_echo(body.tool_choice or "auto"),
            tools=_echo(body.tools or []),
            top_p=params.top_p,
            truncation=body.truncation or "disabled",
            usage=None if self._status in ("in_progress", "failed") else self._usage(),
            user=body.user,
        )

    def _usage(self) -> answers.ResponseUsage:
        usage = self._counter.usage()
        return answers.ResponseUsage(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=answers.PromptTokens(cached_tokens=usage.prompt_tokens_details.cached_tokens),
            output_tokens=usage.completion_tokens,
            output_tokens_details=ReasoningTokens(reasoning_tokens=self._reasoning_tokens()),
            total_tokens=usage.total_tokens,
        )

    def _reasoning_tokens(self) -> int:
        if not any(item.type == "reasoning" for item in self._items.done):
            return 0
        decode = self._tokenizer.decode
        close = self._style.thinking.close
        return count_reasoning_tokens(lambda ids: decode(ids, skip_special_tokens=False), self._token_ids, close)


def _echo(value: Any) -> Any:
    return msgspec.to_builtins(value)
