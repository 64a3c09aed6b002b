"""Gemma 4's tool calls: <|tool_call>call:name{key:<|"|>text<|"|>,other:[1,true]}<tool_call|>.

The arguments are emitted as JSON when the call is complete, or as far as they go at the end of the text. Strings may
also be written as JSON's.
"""

from __future__ import annotations

import json
import re
from typing import Literal

from trio_llm.server.parsing.json_object import ControlEscaper
from trio_llm.server.parsing.pieces import CallArguments, CallStart, Content, Piece, merge, split_at

OPEN, CLOSE, QUOTE = "<|tool_call>", "<tool_call|>", '<|"|>'
_RESULT = "<|tool_response>"  # Ends a turn of calls; a client has no use for it.
_PREFIX = "call:"
MARKERS = (OPEN, CLOSE, QUOTE, _RESULT)
_TOKEN = re.compile(
    r'<\|"\|>(?P<text>.*?)(?P<end><\|"\|>|\Z)|\s*+(?P<json>"(?:[^"\\]++|\\.)*+"(?=\s*+[\]},:]))'
    r"|(?P<mark>[{}\[\],:])|(?P<bare>[^{}\[\],:<]+|<)",
    re.DOTALL,
)
_WORDS = {"true": "true", "false": "false", "null": "null", "None": "null"}
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")


class GemmaCalls:
    """Splits one message into content and calls.

    Attributes:
        num_calls: Calls found so far.
    """

    def __init__(self) -> None:
        self._state: Literal["text", "name", "arguments"] = "text"
        self._held = ""  # In "arguments", the unprocessed tail.
        self._taken: list[str] = []
        self._in_text = False
        self._blanks: list[str] | None = None  # Behind a call or a marker, until there is text; None in text.
        self.num_calls = 0

    def feed(self, text: str) -> list[Piece]:
        """Add text and return the pieces that are certain."""
        self._held += text
        pieces: list[Piece] = []
        while self._step(pieces):
            pass
        return merge(pieces)

    def finish(self) -> list[Piece]:
        """Return the rest at the end of the text.

        An incomplete call is returned as far as it goes; one that ends before its name is dropped with its marker.
        """
        held, self._held = self._held, ""
        if self._state == "arguments":
            return [CallArguments(self.num_calls - 1, json_of("".join(self._taken) + held))]
        if self._state == "name":
            is_cut = held.startswith(_PREFIX) or _PREFIX.startswith(held)
            return [] if is_cut else [Content(OPEN + held)]
        return [Content("".join(self._blanks or ()) + held)] if held else []

    def _step(self, pieces: list[Piece]) -> bool:
        """Process the held text once; return whether more can be processed."""
        if self._state == "text":
            before, marker, self._held = split_at(self._held, [OPEN, _RESULT])
            self._take_text(before, pieces)
            if marker is not None and self.num_calls:
                self._blanks = []
            if marker == OPEN:
                self._state = "name"
            return marker is not None
        if self._state == "name":
            return self._read_name(pieces)
        marks = [QUOTE] if self._in_text else [QUOTE, CLOSE]
        before, marker, self._held = split_at(self._held, marks)
        self._taken.append(before)
        if marker == QUOTE:
            self._taken.append(QUOTE)
            self._in_text = not self._in_text
        elif marker == CLOSE:
            pieces.append(CallArguments(self.num_calls - 1, json_of("".join(self._taken))))
            self._state, self._blanks = "text", []
        return marker is not None

    def _take_text(self, text: str, pieces: list[Piece]) -> None:
        """Hand text on; blanks between calls belong to neither."""
        if self._blanks is not None:
            self._blanks.append(text)
            if not text.strip():
                return
            text, self._blanks = "".join(self._blanks), None
        if text:
            pieces.append(Content(text))

    def _read_name(self, pieces: list[Piece]) -> bool:
        head, brace, rest = self._held.partition("{")
        name = head.strip().removeprefix(_PREFIX)
        if brace and name:
            pieces.append(CallStart(self.num_calls, name))
            self.num_calls += 1
            self._state, self._taken, self._in_text = "arguments", [], False
            self._held = "{" + rest
            return True
        if brace or len(head) > 256:  # Too long for a name.
            pieces.append(Content(OPEN + head))
            self._state, self._blanks = "text", None
            self._held = self._held[len(head) :]
            return True
        return False


def json_of(arguments: str) -> str:
    """Return arguments as JSON; incomplete arguments give incomplete JSON."""
    out: list[str] = []
    inside: list[str] = []  # Brackets that are open.
    is_key = False
    for token in _TOKEN.finditer(arguments):
        if (text := token["text"]) is not None:
            spelled = json.dumps(text, ensure_ascii=False)
            out.append(spelled if token["end"] else spelled[:-1])
        elif (spelled := token["json"]) is not None:
            out.append(_json_string(spelled))
        elif (mark := token["mark"]) is None:
            if bare := token["bare"].strip():
                out.append(_bare(bare, is_key=is_key, is_cut=token.end() == len(arguments)))
        else:
            out.append(f"{mark} " if mark in ",:" else mark)
            if mark in "{[":
                inside.append(mark)
            elif mark in "}]" and inside:
                inside.pop()
            is_key = mark in "{," and inside[-1:] == ["{"]
            if not inside:
                break
    return "".join(out)


def _json_string(spelled: str) -> str:
    try:
        json.loads(spelled, strict=False)
    except ValueError:  # A backslash that escapes nothing.
        return json.dumps(spelled[1:-1], ensure_ascii=False)
    return ControlEscaper().feed(spelled)


def _bare(text: str, *, is_key: bool, is_cut: bool) -> str:
    """Convert a word without quotes: a key, a number, a constant, or text with missing quotes."""
    if not is_key and (text in _WORDS or _NUMBER.fullmatch(text)):
        return _WORDS.get(text, text)
    spelled = json.dumps(text, ensure_ascii=False)
    return spelled[:-1] if is_cut else spelled
