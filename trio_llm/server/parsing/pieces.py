"""What parsers turn text into, and the one trick they share: holding back what may become a marker."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import attrs


@attrs.frozen
class Content:
    """Text of the answer."""

    text: str


@attrs.frozen
class Reasoning:
    """Text of the thinking that comes before the answer."""

    text: str


@attrs.frozen
class CallStart:
    """A tool call begins: its index among the calls of this message and the function's name."""

    index: int
    name: str


@attrs.frozen
class CallArguments:
    """A further part of a call's arguments, as the JSON text the model writes."""

    index: int
    text: str


Piece = Content | Reasoning | CallStart | CallArguments


def merge(pieces: Iterable[Piece]) -> list[Piece]:
    """Join neighbours of one kind, so that a client gets few large pieces instead of many small ones."""
    merged: list[Piece] = []
    for piece in pieces:
        match merged[-1] if merged else None, piece:
            case (Content(before), Content(text)):
                merged[-1] = Content(before + text)
            case (CallArguments(index, before), CallArguments(same, text)) if index == same:
                merged[-1] = CallArguments(index, before + text)
            case _:
                merged.append(piece)
    return merged


def split_at(text: str, markers: Sequence[str]) -> tuple[str, str | None, str]:
    """Cut text at the earliest of several markers: (before, marker, after).

    Without a marker, `after` is the tail that may still become one, and `before` is all that certainly is not.
    """
    found = min(((at, marker) for marker in markers if (at := text.find(marker)) >= 0), default=None)
    if found is not None:
        at, marker = found
        return text[:at], marker, text[at + len(marker) :]
    for size in range(min(len(text), max(map(len, markers)) - 1), 0, -1):
        tail = text[-size:]
        if any(marker.startswith(tail) for marker in markers):
            return text[:-size], None, tail
    return text, None, ""
