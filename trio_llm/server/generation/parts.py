"""The parts of an answer, for APIs with typed events: each part begins, grows and ends before the next begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, Literal, Protocol, TypeVar

import attrs

from trio_llm.server.parsing.pieces import CallArguments, CallStart, Content, Piece, Reasoning

Event_co = TypeVar("Event_co", covariant=True)
PartKind = Literal["text", "reasoning", "call"]


@attrs.define
class Part:
    """A contiguous part of an answer: text, thinking or a call.

    Attributes:
        index: Its index in the answer.
        name: The function, for a call.
    """

    kind: PartKind
    index: int
    name: str = ""
    _texts: list[str] = attrs.field(factory=list[str], init=False)

    @property
    def text(self) -> str:
        """The text so far, or the call's arguments as JSON."""
        return "".join(self._texts)

    def add(self, text: str) -> None:
        self._texts.append(text)


class PartSpelling(Protocol[Event_co]):
    """Converts parts to an API's events."""

    def begin(self, part: Part) -> Sequence[Event_co]:
        """Return the events for the start of a part."""
        ...

    def grow(self, part: Part, text: str) -> Sequence[Event_co]:
        """Return the events for text added to a part."""
        ...

    def end(self, part: Part, *, cut_short: bool) -> Sequence[Event_co]:
        """Return the events for the end of a part."""
        ...


class Parts(Generic[Event_co]):
    """Turns the pieces of one answer into the events of its parts.

    Attributes:
        num_parts: Parts that have begun.
    """

    def __init__(self, spelling: PartSpelling[Event_co]) -> None:
        self.num_parts = 0
        self._spelling = spelling
        self._open: Part | None = None

    def add(self, pieces: Sequence[Piece]) -> list[Event_co]:
        """Add pieces of the answer."""
        events: list[Event_co] = []
        for piece in pieces:
            match piece:
                case Content():
                    events += self._grow("text", piece.text)
                case Reasoning():
                    events += self._grow("reasoning", piece.text)
                case CallStart():
                    events += self.begin("call", piece.name)
                case CallArguments():
                    events += self._grow("call", piece.text)
        return events

    def begin(self, kind: PartKind, name: str = "") -> list[Event_co]:
        """End the current part and begin one."""
        ended = self.end(cut_short=False)
        self._open = Part(kind, self.num_parts, name)
        self.num_parts += 1
        return [*ended, *self._spelling.begin(self._open)]

    def end(self, *, cut_short: bool) -> list[Event_co]:
        """End the last part; `cut_short` if a limit did."""
        part, self._open = self._open, None
        return [] if part is None else list(self._spelling.end(part, cut_short=cut_short))

    def _grow(self, kind: PartKind, text: str) -> list[Event_co]:
        begun = self.begin(kind) if self._open is None or self._open.kind != kind else []
        assert self._open is not None
        self._open.add(text)
        return [*begun, *self._spelling.grow(self._open, text)]
