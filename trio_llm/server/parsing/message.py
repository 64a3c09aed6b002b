"""Split a chat model's answer into reasoning, content and tool calls while it streams."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from trio_llm.server.parsing.custom_inputs import CustomInputs, CustomTools
from trio_llm.server.parsing.pieces import CallArguments, CallStart, Content, Piece, Reasoning
from trio_llm.server.parsing.reasoning import THINK, ReasoningParser, ThinkingForm
from trio_llm.server.parsing.response_parser import ResponseParser, ResponseStyle
from trio_llm.server.parsing.tools import CALL_MARKERS, ToolForm, tool_parser


@attrs.frozen
class MessageStyle:
    """How to read an answer.

    Attributes:
        thinks: The model may think first, in the form of `thinking`; with `thinking_begun` the prompt ended inside it.
        tool_form: How calls are written; None if no tool was offered.
        parallel: Return all calls, not only the first.
        show_reasoning: Return reasoning instead of dropping it.
        response: Read the answer with the model's own template instead of these forms.
        custom: The tools whose calls have a text; None if there are none.
    """

    thinks: bool = False
    thinking: ThinkingForm = THINK
    thinking_begun: bool = False
    tool_form: ToolForm | None = None
    parallel: bool = True
    show_reasoning: bool = True
    response: ResponseStyle | None = None
    custom: CustomTools | None = None


class MessageParser:
    """Splits one message."""

    def __init__(self, style: MessageStyle) -> None:
        self._style = style
        marker = CALL_MARKERS[style.tool_form] if style.tool_form is not None else None
        inside = style.thinking_begun
        self._reasoning = ReasoningParser(style.thinking, inside=inside, marker=marker) if style.thinks else None
        self._tools = tool_parser(style.tool_form) if style.tool_form is not None else None
        self._response = ResponseParser(style.response) if style.response is not None else None
        self._inputs = CustomInputs(style.custom) if style.custom is not None else None

    @property
    def num_calls(self) -> int:
        parser = self._response or self._tools
        return parser.num_calls if parser is not None else 0

    def feed(self, text: str) -> list[Piece]:
        """Add text and return the pieces that are certain."""
        pieces = self._feed(text)
        return pieces if self._inputs is None else self._inputs.replace(pieces)

    def finish(self) -> list[Piece]:
        """Return the rest at the end of the text."""
        pieces = self._finish()
        return pieces if self._inputs is None else self._inputs.replace(pieces) + self._inputs.finish()

    def _feed(self, text: str) -> list[Piece]:
        if self._response is not None:
            return self._kept(self._response.feed(text))
        if self._reasoning is not None:
            return self._split(self._reasoning.feed(text))
        return self._split([Content(text)] if text else [])

    def _finish(self) -> list[Piece]:
        if self._response is not None:
            return self._kept(self._response.finish())
        pieces = self._split(self._reasoning.finish() if self._reasoning is not None else [])
        if self._tools is None:
            return pieces
        unclosed = self._reasoning.unclosed if self._reasoning is not None else ""
        rest: list[Piece] = self._tools.feed(unclosed) + self._tools.finish()
        if unclosed and not self._tools.num_calls:
            rest = [Reasoning(unclosed)]
        return pieces + self._kept(rest)

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
