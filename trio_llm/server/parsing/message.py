"""One answer of a chat model, split into reasoning, content and tool calls while it streams."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from trio_llm.server.parsing.pieces import CallArguments, CallStart, Content, Piece, Reasoning
from trio_llm.server.parsing.reasoning import ReasoningParser
from trio_llm.server.parsing.tools import ToolForm, ToolParser


@attrs.frozen
class MessageStyle:
    """How to read an answer.

    Attributes:
        thinks: The model may think first; `thinking_begun` says that the prompt ended inside its thinking.
        tool_form: How calls are written; None where no tool was offered.
        parallel: More than one call counts; otherwise the first one does.
        show_reasoning: Hand reasoning on, instead of leaving it out.
    """

    thinks: bool = False
    thinking_begun: bool = False
    tool_form: ToolForm | None = None
    parallel: bool = True
    show_reasoning: bool = True


class MessageParser:
    """Splits one message."""

    def __init__(self, style: MessageStyle) -> None:
        self._style = style
        self._reasoning = ReasoningParser(inside=style.thinking_begun) if style.thinks else None
        self._tools = ToolParser(style.tool_form) if style.tool_form is not None else None

    @property
    def num_calls(self) -> int:
        return self._tools.num_calls if self._tools is not None else 0

    def feed(self, text: str) -> list[Piece]:
        """Take in more text and return what it certainly is."""
        if self._reasoning is not None:
            return self._split(self._reasoning.feed(text))
        return self._split([Content(text)] if text else [])

    def finish(self) -> list[Piece]:
        """Return what was held back when the text has ended."""
        pieces = self._split(self._reasoning.finish() if self._reasoning is not None else [])
        return pieces + self._kept(self._tools.finish() if self._tools is not None else [])

    def _split(self, pieces: Sequence[Piece]) -> list[Piece]:
        split: list[Piece] = []
        for piece in pieces:
            if isinstance(piece, Content) and self._tools is not None:
                split += self._tools.feed(piece.text)
            else:
                split.append(piece)
        return self._kept(split)

    def _kept(self, pieces: list[Piece]) -> list[Piece]:
        return [piece for piece in pieces if self._is_kept(piece)]

    def _is_kept(self, piece: Piece) -> bool:
        match piece:
            case Reasoning():
                return self._style.show_reasoning
            case CallStart() | CallArguments():
                return self._style.parallel or piece.index == 0
            case Content():
                return True
