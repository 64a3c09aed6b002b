"""The texts for custom tools: to the model each is the argument `input` of a function."""

from __future__ import annotations

import json
from collections.abc import Sequence

import attrs

from trio_llm.config import LimitsConfig
from trio_llm.errors import InvalidRequestError
from trio_llm.server.parsing.pieces import CallArguments, CallStart, Piece
from trio_llm.server.parsing.readable_json import readable_object


@attrs.frozen
class CustomTools:
    """The custom tools of a request.

    Attributes:
        names: What the model calls.
        limits: Of the arguments that are read.
    """

    names: frozenset[str]
    limits: LimitsConfig


class CustomInputs:
    """Replaces the arguments of custom tools' calls by the texts in them, each when its call is complete."""

    def __init__(self, tools: CustomTools) -> None:
        self._tools = tools
        self._open: int | None = None  # Index of the call whose arguments are collected.
        self._arguments: list[str] = []

    def replace(self, pieces: Sequence[Piece]) -> list[Piece]:
        """Return the pieces with texts; the arguments of the last call may be held back."""
        replaced: list[Piece] = []
        for piece in pieces:
            if isinstance(piece, CallArguments) and piece.index == self._open:
                self._arguments.append(piece.text)
                continue
            replaced += self.finish()
            if isinstance(piece, CallStart) and piece.name in self._tools.names:
                self._open, self._arguments = piece.index, []
                piece = attrs.evolve(piece, is_custom=True)  # noqa: PLW2901 - the same piece, told apart
            replaced.append(piece)
        return replaced

    def finish(self) -> list[Piece]:
        """Return the text of a call that has no more arguments."""
        index, self._open = self._open, None
        text = "" if index is None else _text_in("".join(self._arguments), self._tools.limits)
        return [CallArguments(index, text)] if index is not None and text else []


def input_arguments(text: str) -> str:
    """Return the arguments, as JSON, of the function that a custom tool is to the model."""
    return json.dumps({"input": text}, ensure_ascii=False)


def _text_in(arguments: str, limits: LimitsConfig) -> str:
    """Return the text for a custom tool; what the model wrote as its arguments, if that is not in the form."""
    try:
        said = readable_object(arguments, limits)[0].get("input", "" if not arguments else None)
    except InvalidRequestError:
        said = None
    return said if isinstance(said, str) else arguments
