"""What a chat says, in a shape that is the same for an answer in one piece and for one that was streamed."""

from __future__ import annotations

from typing import Any

import attrs


@attrs.define
class Said:
    """One choice of a chat, ids apart.

    Attributes:
        calls: [name, arguments] of each.
        ends: Every finish and stop reason that was given; a good answer gives one.
    """

    content: str = ""
    reasoning: str = ""
    calls: list[list[str]] = attrs.field(factory=list)
    logprobs: list[Any] = attrs.field(factory=list)
    ends: list[tuple[str, Any]] = attrs.field(factory=list)

    def add(self, choice: dict[str, Any], part: dict[str, Any]) -> None:
        """Add a part of a message: all of it, or a delta."""
        self.content += part.get("content") or ""
        self.reasoning += part.get("reasoning") or ""
        for position, call in enumerate(part.get("tool_calls", ())):
            function, index = call["function"], call.get("index", position)
            if index == len(self.calls):
                self.calls.append([function["name"], ""])
            self.calls[index][1] += function["arguments"]
        self.logprobs += (choice.get("logprobs") or {}).get("content", ())
        if choice["finish_reason"] is not None:
            self.ends.append((choice["finish_reason"], choice["stop_reason"]))


def whole(answer: dict[str, Any]) -> list[Said]:
    """Return what an answer says, choice by choice."""
    said = [Said() for _ in answer["choices"]]
    for choice in answer["choices"]:
        said[choice["index"]].add(choice, choice["message"])
    return said


def streamed(events: list[Any]) -> list[Said]:
    """Return what a stream says, choice by choice."""
    *chunks, done = events
    assert done == "[DONE]"
    said: dict[int, Said] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            said.setdefault(choice["index"], Said()).add(choice, choice["delta"])
    return [said[index] for index in sorted(said)]
