"""Split a model's thinking from its answer by the markers of its template."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence

import attrs

from trio_llm.server.parsing.pieces import Content, Piece, Reasoning, split_at

_STRIDE_TOKENS = 64


@attrs.frozen
class ThinkingForm:
    """The markers around thinking.

    With a `label`, these are channels: there may be several of them. The label may follow the first marker or stand
    without it, and is not part of the thinking.
    """

    open: str
    close: str
    label: str = ""

    @property
    def markers(self) -> tuple[str, str]:
        return self.open, self.close


THINK = ThinkingForm("<think>", "</think>")
_FORMS = (
    THINK,  # Qwen3, DeepSeek-R1 and most others
    ThinkingForm("<|channel>", "<channel|>", label="thought"),  # Gemma 4
    ThinkingForm("[THINK]", "[/THINK]"),  # Magistral
    ThinkingForm("<seed:think>", "</seed:think>"),  # Seed-OSS
)


def thinking_form(chat_template: str, special_tokens: Container[str] = ()) -> ThinkingForm | None:
    """Return the form of a model's thinking; None if it does not think.

    The template contains the marker. Channels have their own control tokens, which a template need not contain.
    """
    known = (form for form in _FORMS if form.close in chat_template or (form.label and form.close in special_tokens))
    return next(known, None)


class ReasoningParser:
    """Splits one message. Thinking can only come first; a later opening marker is ordinary text.

    A model may end thinking that it never began, for example if its template began it in the prompt. The text before is
    content by then, as it may have been sent; the marker itself is dropped.

    Args:
        inside: The prompt already opened the thinking, as some templates do.
        marker: The marker of a tool call. Some models call without closing their thinking. Text after a marker is held
            back until thinking closes (then it is thinking) or until the end.

    Attributes:
        unclosed: At the end, the text after a marker inside unclosed thinking.
    """

    def __init__(self, form: ThinkingForm = THINK, *, inside: bool = False, marker: str | None = None) -> None:
        self.unclosed = ""
        self._form = form
        self._held = ""
        self._blanks: list[str] = []  # Before the first text.
        self._state = "lead" if inside else "start"
        self._ends = [form.close] if marker is None else [form.close, marker]
        self._doubtful: list[str] = []  # Thinking, if it is closed later.

    def feed(self, text: str) -> list[Piece]:
        """Add text and return the pieces that are certain."""
        if self._state == "start" and not self._held and not text.strip():
            self._blanks.append(text)
            return []
        self._held += text
        pieces: list[Piece] = []
        before = None
        while (self._state, self._held) != before:
            before = self._state, self._held
            self._step(pieces)
        return pieces

    def finish(self) -> list[Piece]:
        """Return the rest at the end of the text."""
        held, self._held = "".join(self._blanks) + self._held, ""
        if self._state == "doubt":
            self.unclosed = "".join(self._doubtful) + held
            return []
        if not held or self._state in ("label", "lead", "gap"):
            return []
        return [Reasoning(held) if self._state == "reasoning" else Content(held)]

    def _step(self, pieces: list[Piece]) -> None:
        match self._state:
            case "start":
                self._begin()
            case "label":
                self._skip_label()
            case "lead":
                self._skip_line_breaks("reasoning")
            case "reasoning":
                self._think(pieces)
            case "doubt":
                before, marker, self._held = split_at(self._held, [self._form.close])
                self._doubtful.append(before)
                if marker:
                    self._state = "gap"
                    pieces.append(Reasoning("".join(self._doubtful)))
            case "gap":
                # Models put line breaks around their thinking; they belong neither to it nor to the answer.
                self._skip_line_breaks("start" if self._form.label else "content")
            case "unopened":
                self._answer_unopened(pieces)
            case _:
                if self._held:
                    pieces.append(Content(self._held))
                    self._held = ""

    def _begin(self) -> None:
        """Detect whether thinking comes next."""
        stripped = self._held.lstrip()
        openings = [self._form.open, *([self._form.label + self._form.close] if self._form.label else [])]
        for opening, state in zip(openings, ("label", "gap"), strict=False):
            if stripped.startswith(opening):
                self._held, self._state, self._blanks = stripped[len(opening) :], state, []
                return
        if not any(opening.startswith(stripped) for opening in openings):
            self._held, self._state, self._blanks = "".join(self._blanks) + self._held, "unopened", []

    def _skip_label(self) -> None:
        label = self._form.label
        if self._held.startswith(label):
            self._held, self._state = self._held[len(label) :], "lead"
        elif not label.startswith(self._held):
            self._state = "lead"

    def _skip_line_breaks(self, then: str) -> None:
        self._held = self._held.lstrip("\n")
        if self._held:
            self._state = then

    def _think(self, pieces: list[Piece]) -> None:
        before, marker, self._held = split_at(self._held, self._ends)
        if before:
            pieces.append(Reasoning(before))
        if marker:
            self._state = "gap" if marker == self._form.close else "doubt"
            self._doubtful = [marker]

    def _answer_unopened(self, pieces: list[Piece]) -> None:
        """Return content without end markers of thinking that never began."""
        form = self._form
        before, marker, self._held = split_at(self._held, form.markers if form.label else [form.close])
        if before:
            pieces.append(Content(before))
        if marker:
            self._state = "content" if not form.label else "label" if marker == form.open else "start"


def count_reasoning_tokens(
    decode: Callable[[Sequence[int]], str], token_ids: Sequence[int], close: str = THINK.close
) -> int:
    """Count an output's tokens up to and including the end of its thinking; all tokens if it does not end.

    Args:
        decode: Turns ids into text, control tokens included.
        close: The marker.
    """
    before = len(close)  # The marker may consist of up to this many tokens.
    for start in range(0, len(token_ids), _STRIDE_TOKENS):
        end = start + _STRIDE_TOKENS
        if close in decode(token_ids[max(0, start - before) : end]):
            ends = range(start + 1, min(end, len(token_ids)) + 1)
            return next((at for at in ends if close in decode(token_ids[max(0, at - before - 1) : at])), ends[-1])
    return len(token_ids)
