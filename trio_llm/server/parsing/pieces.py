"""The output of parsers, and their shared way to hold back text that may become a marker."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

import attrs


@attrs.frozen
class Content:
    """Text of the answer."""

    text: str


@attrs.frozen
class Reasoning:
    """Text of the thinking before the answer."""

    text: str


@attrs.frozen
class CallStart:
    """A tool call begins: its index among the calls of this message and the tool's name.

    Attributes:
        is_custom: It is a custom tool's: what follows is the text for it, no JSON.
    """

    index: int
    name: str
    is_custom: bool = False


@attrs.frozen
class CallArguments:
    """The next part of a call's arguments, as the model's JSON text, or of the text for a custom tool."""

    index: int
    text: str


Piece = Content | Reasoning | CallStart | CallArguments


def merge(pieces: Iterable[Piece]) -> list[Piece]:
    """Join neighbours of one kind, so that a client gets fewer, larger pieces."""
    merged: list[Piece] = []
    for _, group in groupby(pieces, _run):
        run = list(group)
        match run[0]:
            case CallStart():
                merged += run
            case first:  # All texts at once: adding one after the other takes quadratic time.
                text = "".join(piece.text for piece in run if not isinstance(piece, CallStart))
                merged.append(attrs.evolve(first, text=text))
    return merged


def _run(piece: Piece) -> object:
    """Return what the neighbours of one run have in common."""
    match piece:
        case CallArguments():
            return piece.index
        case CallStart():
            return object()
        case _:
            return type(piece)


def split_at(text: str, markers: Sequence[str]) -> tuple[str, str | None, str]:
    """Cut text at the earliest of several markers: (before, marker, after).

    Without a marker, `after` is the tail that may still become one, and `before` is the rest.
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
