"""Split a model's answer with its response template while it streams."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import attrs
import regex

from trio_llm.server.parsing.pieces import CallArguments, CallStart, Content, Piece, Reasoning, merge
from trio_llm.server.parsing.response_template import Delimiter, Field, ResponseTemplate
from trio_llm.server.parsing.response_values import TIMEOUT_S, calls_of, json_text

logger = logging.getLogger(__name__)

# A longer match is none: text that could still become a delimiter is held back and searched again.
_MAX_DELIMITER_CHARS = 1024
_CONTEXT_CHARS = 256  # What a pattern can look back at.

_Found = tuple[Literal["open", "close"], Field, regex.Match[str]]


@attrs.frozen
class ResponseStyle:
    """How to read an answer with a template.

    Attributes:
        prompt: The end of the prompt, as far as it belongs to the answer.
        schemas: Function -> JSON schema of its arguments; None if no tool was offered: then calls are text.
    """

    template: ResponseTemplate
    prompt: str = ""
    schemas: Mapping[str, Any] | None = None


class _Region:
    """An open field: the text so far, and how much of it was sent."""

    def __init__(self, field: Field | None, opening: str = "", captures: Mapping[str, str] | None = None) -> None:
        self.field = field
        self.captures = dict(captures or {})
        self.raw = [opening]
        self.body: list[str] = []
        self.shown = False
        self._blanks: list[str] = []

    def trimmed(self, text: str) -> str:
        """Return what of further text is certain: white space may be the end's."""
        assert self.field is not None
        if not self.field.strips:
            return text
        if not text.strip():
            self._blanks.append(text)
            return ""
        text = "".join(self._blanks) + text
        kept = text.rstrip()
        self._blanks = [text[len(kept) :]]
        return kept if self.shown else kept.lstrip()


class ResponseParser:
    """Splits one message.

    Of a field that does not repeat, transformers keeps the last occurrence. A stream cannot take text back, so here all
    of them count, on lines of their own. A call that cannot be read is text.

    Attributes:
        num_calls: Calls found so far.
    """

    def __init__(self, style: ResponseStyle) -> None:
        self.num_calls = 0
        self._template = style.template
        self._schemas = style.schemas
        self._text, self._at = style.prompt, 0
        self._prompt_end = len(style.prompt)  # Text of the prompt decides where the answer begins, but is not sent.
        self._region = _Region(self._template.implicit)
        self._spoken: set[str] = set()
        self._fired: set[tuple[str, str]] = set()  # Delimiters without a character, found at `_at`.
        self._given_up = False
        self._pieces: list[Piece] = []

    def feed(self, text: str) -> list[Piece]:
        """Add text and return the pieces that are certain."""
        self._text += text
        return self._parse(at_end=False)

    def finish(self) -> list[Piece]:
        """Return the rest at the end of the text."""
        return self._parse(at_end=True)

    def _parse(self, *, at_end: bool) -> list[Piece]:
        try:
            if not self._given_up:
                self._process(at_end=at_end)
        except TimeoutError:
            logger.warning("the response template takes too long for an answer: the rest of it is text")
            self._given_up = True
        if self._given_up:
            self._say("content", "".join(self._region.raw[1:]) if self._region.body else "")
            self._say("content", self._text[max(self._at, self._prompt_end) :])
            self._region, self._text, self._at, self._prompt_end = _Region(None), "", 0, 0
        pieces, self._pieces = merge(self._pieces), []
        return pieces

    def _process(self, *, at_end: bool) -> None:
        while True:
            found, hold = self._next(at_end=at_end)
            if found is not None:
                self._take(found)
            elif not at_end and len(self._text) - hold > _MAX_DELIMITER_CHARS:
                self._advance(hold + 1)
            else:
                self._advance(len(self._text) if at_end else hold)
                break
        if at_end:
            self._close("")
        cut = max(0, self._at - _CONTEXT_CHARS)
        self._text, self._at, self._prompt_end = self._text[cut:], self._at - cut, max(0, self._prompt_end - cut)

    def _watched(self) -> list[tuple[Literal["open", "close"], Field, Delimiter]]:
        """Return the delimiters that count now: what closes an opened field, else all that open one."""
        field = self._region.field
        ends = [("close", field, field.close)] if field is not None and field.close is not None else []
        if field is not self._template.implicit:
            return [("close", one, delimiter) for _, one, delimiter in ends]
        opens = [("open", one, one.open) for one in self._template.fields if one.open is not None]
        return [*(("open", one, d) for _, one, d in opens), *(("close", one, d) for _, one, d in ends)]

    def _next(self, *, at_end: bool) -> tuple[_Found | None, int]:
        """Return the first delimiter that is certain, and where one begins that is not."""
        hold = len(self._text)
        best: tuple[tuple[int, int, str, str], _Found] | None = None
        for what, field, delimiter in self._watched():
            match = self._search(what, field, delimiter, at_end=at_end)
            if match is None:
                continue
            if not at_end and (match.partial or self._may_grow(delimiter, match)):
                hold = min(hold, match.start())
                continue
            # The earliest one, of these the longest, and what opens before what closes.
            key = (match.start(), -len(match[0]), "a" if what == "open" else "b", field.name)
            if best is None or key < best[0]:
                best = key, (what, field, match)
        certain = best is not None and best[1][2].start() < hold
        return (best[1] if best is not None and certain else None), hold

    def _search(self, what: str, field: Field, delimiter: Delimiter, *, at_end: bool) -> regex.Match[str] | None:
        start = self._at
        while start <= len(self._text):
            match = delimiter.pattern.search(self._text, start, partial=not at_end, timeout=TIMEOUT_S)
            is_empty = match is not None and not match.partial and match.start() == match.end() == self._at
            if not is_empty or (what, field.name) not in self._fired:
                return match
            start += 1
        return None

    def _may_grow(self, delimiter: Delimiter, match: regex.Match[str]) -> bool:
        """Return whether further text could change a match."""
        if delimiter.literals:
            return match.end() == len(self._text) and delimiter.can_extend
        if match.end() == len(self._text):
            return True
        # It may lean on the end of the text. Neither a line break nor the end follows here.
        again = delimiter.pattern.match(self._text + "\0", match.start(), timeout=TIMEOUT_S)
        return again is None or again.span() != match.span() or again.groupdict() != match.groupdict()

    def _take(self, found: _Found) -> None:
        what, field, match = found
        self._advance(match.start())
        captures = {name: text for name, text in match.groupdict().items() if text is not None}
        if match.end() > self._at:
            self._fired = set()
        self._fired.add((what, field.name))
        self._at = match.end()
        if what == "open":
            self._close("")
            self._region = _Region(field, match[0], captures)
        else:
            self._region.captures.update(captures)
            self._close(match[0])

    def _advance(self, end: int) -> None:
        """Add the text up to `end` to the open field; what stands in the prompt is not sent."""
        split = min(max(self._at, self._prompt_end), end)
        for text, is_sent in ((self._text[self._at : split], False), (self._text[split:end], True)):
            if text:
                self._grow(text, is_sent=is_sent)
        if end > self._at:
            self._fired = set()
        self._at = end

    def _grow(self, text: str, *, is_sent: bool) -> None:
        region, field = self._region, self._region.field
        if field is None or field.kind == "other":
            return
        if not field.is_text or field.kind == "calls":
            region.body.append(text)
            region.raw.append(text)
        elif shown := region.trimmed(text):
            separator = field.join if not region.shown and field.kind in self._spoken else ""
            region.shown = True
            self._spoken.add(field.kind)
            if is_sent:
                self._say(field.kind, separator + shown)

    def _close(self, closing: str) -> None:
        """Close the open field; one whose value has a form is sent now."""
        region, self._region = self._region, _Region(self._template.implicit)
        field = region.field
        if field is None or field.kind == "other" or (field.is_text and field.kind != "calls"):
            return
        if (not region.body and not region.raw[0]) or self._at < self._prompt_end:
            return
        try:
            value = field.value("".join(region.body), region.captures)
            calls = calls_of(value, self._schemas or {}) if field.kind == "calls" else []
        except (ValueError, TypeError, RecursionError):
            calls, value = [], None
        if field.kind != "calls" and value is not None:
            self._say(field.kind, value if isinstance(value, str) else json_text(value))
        elif calls and self._schemas is not None:
            self._call(calls)
        else:
            self._say("content", "".join([*region.raw, closing]))

    def _call(self, calls: Sequence[tuple[str, str]]) -> None:
        for name, arguments in calls:
            self._pieces += [CallStart(self.num_calls, name), CallArguments(self.num_calls, arguments)]
            self.num_calls += 1

    def _say(self, kind: str, text: str) -> None:
        if text:
            self._pieces.append(Reasoning(text) if kind == "reasoning" else Content(text))
