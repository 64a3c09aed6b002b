"""The output of a response: what the model thinks, says and calls as items, and the events by which each one grows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import attrs

from trio_llm.server.parsing.pieces import CallArguments, CallStart, Content, Piece, Reasoning
from trio_llm.server.translation import new_id

Event = dict[str, Any]
Status = Literal["in_progress", "completed", "incomplete"]
_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc"}


@attrs.define
class _Item:
    """An item that may still grow; its text is what is said or thought, or a call's arguments."""

    kind: Literal["message", "reasoning", "function_call"]
    index: int
    name: str = ""
    id: str = attrs.field(init=False)
    call_id: str = attrs.field(factory=lambda: new_id("call"))
    _texts: list[str] = attrs.field(factory=list[str])

    def __attrs_post_init__(self) -> None:
        self.id = new_id(_PREFIXES[self.kind])

    @property
    def text(self) -> str:
        return "".join(self._texts)

    def begin(self) -> list[Event]:
        """Return the events with which it appears."""
        events: list[Event] = [self._item_event("added", self.shown("in_progress"))]
        if self.kind != "function_call":
            events.append(self._event("content_part.added", part=self._part("")))
        return events

    def grow(self, text: str) -> Event:
        """Add to its text."""
        self._texts.append(text)
        return self._event(f"{self._stem}.delta", delta=text, **self._logprobs)

    def end(self, status: Status) -> list[Event]:
        """Return the events with which it is complete."""
        item_done = self._item_event("done", self.shown(status))
        if self.kind == "function_call":
            return [self._event(f"{self._stem}.done", name=self.name, arguments=self.text), item_done]
        return [
            self._event(f"{self._stem}.done", text=self.text, **self._logprobs),
            self._event("content_part.done", part=self._part(self.text)),
            item_done,
        ]

    def shown(self, status: Status) -> dict[str, Any]:
        """Return the item as it stands; one that has just begun has no content yet."""
        item: dict[str, Any] = {"id": self.id, "type": self.kind, "status": status}
        if self.kind == "function_call":
            return {**item, "call_id": self.call_id, "name": self.name, "arguments": self.text}
        content = [] if status == "in_progress" else [self._part(self.text)]
        if self.kind == "reasoning":
            return {**item, "summary": [], "content": content}
        return {**item, "role": "assistant", "content": content}

    @property
    def _stem(self) -> str:
        stems = {"message": "output_text", "reasoning": "reasoning_text", "function_call": "function_call_arguments"}
        return stems[self.kind]

    @property
    def _logprobs(self) -> dict[str, Any]:
        # Clients' types demand them of text, though none can be asked for.
        return {"logprobs": []} if self.kind == "message" else {}

    def _part(self, text: str) -> dict[str, Any]:
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _event(self, event: str, /, **fields: Any) -> Event:
        place = {"item_id": self.id, "output_index": self.index}
        if self.kind != "function_call":
            place["content_index"] = 0
        return {"type": f"response.{event}", **place, **fields}

    def _item_event(self, what: str, item: dict[str, Any]) -> Event:
        return {"type": f"response.output_item.{what}", "output_index": self.index, "item": item}


class OutputItems:
    """Turns pieces of an answer into items.

    Attributes:
        done: The items that are complete.
    """

    def __init__(self) -> None:
        self.done: list[dict[str, Any]] = []
        self._open: _Item | None = None

    def add(self, pieces: Sequence[Piece]) -> list[Event]:
        """Take in more of the answer."""
        events: list[Event] = []
        for piece in pieces:
            match piece:
                case Content():
                    events += self._grow("message", piece.text)
                case Reasoning():
                    events += self._grow("reasoning", piece.text)
                case CallStart():
                    events += self._begin("function_call", piece.name)
                case CallArguments():
                    events += self._grow("function_call", piece.text)
        return events

    def finish(self, status: Status) -> list[Event]:
        """End the last item; an answer of nothing is a message of nothing, for clients that look for one."""
        begun = [] if self.done or self._open else self._begin("message")
        return begun + self._end(status)

    def _grow(self, kind: Literal["message", "reasoning", "function_call"], text: str) -> list[Event]:
        begun = self._begin(kind) if self._open is None or self._open.kind != kind else []
        assert self._open is not None
        return [*begun, self._open.grow(text)]

    def _begin(self, kind: Literal["message", "reasoning", "function_call"], name: str = "") -> list[Event]:
        ended = self._end("completed")
        self._open = _Item(kind, len(self.done), name)
        return ended + self._open.begin()

    def _end(self, status: Status) -> list[Event]:
        item, self._open = self._open, None
        if item is None:
            return []
        self.done.append(item.shown(status))
        return item.end(status)
