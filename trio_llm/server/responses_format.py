"""OpenAI's response object, and the events that a streamed one is told by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from trio_llm.engine import Delta, Stream
from trio_llm.server.errors import HttpError
from trio_llm.server.generation import Head, UsageCounter
from trio_llm.server.parsing.message import MessageParser, MessageStyle
from trio_llm.server.parsing.reasoning import count_reasoning_tokens
from trio_llm.server.responses_body import ResponsesBody
from trio_llm.server.responses_items import OutputItems
from trio_llm.tokenizer import Tokenizer


class ResponsesFormat:
    """Spells what the engine produces as a response; whole and streamed are the same events, kept or sent."""

    def __init__(
        self, head: Head, body: ResponsesBody, stream: Stream, style: MessageStyle, tokenizer: Tokenizer
    ) -> None:
        self._head = head
        self._body = body
        self._style = style
        self._tokenizer = tokenizer
        self._parser = MessageParser(style)
        self._items = OutputItems()
        self._counter = UsageCounter([stream], 1)
        self._token_ids: list[int] = []
        self._status: Literal["in_progress", "completed", "incomplete", "failed"] = "in_progress"
        self._num_events = 0

    def answer(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        """Return the whole response."""
        for delta in deltas:
            self.chunks(0, delta)
        return self._response()

    def chunks(self, index: int, delta: Delta) -> Sequence[dict[str, Any]]:
        """Return the events for what the stream produced."""
        events: list[dict[str, Any]] = []
        if not self._num_events:
            events += [self._response_event("created"), self._response_event("in_progress")]
        self._counter.add(index, delta)
        self._token_ids += delta.token_ids
        pieces = self._parser.feed(delta.text)
        if delta.finish_reason is not None:
            pieces += self._parser.finish()
        events += self._items.add(pieces)
        if delta.finish_reason is not None:
            self._status = "incomplete" if delta.finish_reason == "length" else "completed"
            events += self._items.finish(self._status)
            events.append(self._response_event(self._status))
        return self._numbered(events)

    def last_chunks(self) -> Sequence[dict[str, Any]]:
        """Return nothing: the last event went with the last delta."""
        return ()

    def error_chunks(self, error: HttpError) -> Sequence[dict[str, Any]]:
        """Return what ends a stream that fails."""
        self._status = "failed"
        failed = self._response_event("failed")
        failed["response"]["error"] = {"code": "server_error", "message": error.message}
        return self._numbered([failed])

    def _numbered(self, events: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for event in events:
            event["sequence_number"] = self._num_events
            self._num_events += 1
        return events

    def _response_event(self, name: str) -> dict[str, Any]:
        return {"type": f"response.{name}", "response": self._response()}

    def _response(self) -> dict[str, Any]:
        body = self._body
        return {
            "id": self._head.id,
            "object": "response",
            "created_at": self._head.created,
            "status": self._status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if self._status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self._head.model,
            "output": list(self._items.done),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "prompt_cache_key": body.prompt_cache_key,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "safety_identifier": body.safety_identifier,
            "service_tier": "default",
            "store": False,
            "temperature": body.temperature,
            "text": {"format": _echo(body.text.format) if body.text and body.text.format else {"type": "text"}},
            "tool_choice": _echo(body.tool_choice or "auto"),
            "tools": _echo(body.tools or []),
            "top_logprobs": 0,
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": None if self._status in ("in_progress", "failed") else self._usage(),
            "user": body.user,
        }

    def _usage(self) -> dict[str, Any]:
        usage = self._counter.usage()
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": self._reasoning_tokens()},
            "total_tokens": usage["total_tokens"],
        }

    def _reasoning_tokens(self) -> int:
        if not any(item["type"] == "reasoning" for item in self._items.done):
            return 0
        decode = self._tokenizer.decode
        return count_reasoning_tokens(lambda ids: decode(ids, skip_special_tokens=False), self._token_ids)


def _echo(value: Any) -> Any:
    return msgspec.to_builtins(value)
