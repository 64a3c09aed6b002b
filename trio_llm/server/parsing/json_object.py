"""Read a JSON object incrementally: its top-level keys and the raw text of their values.

Used for tool calls: their arguments are streamed to the client exactly as the model writes them.
"""

from __future__ import annotations

import json
from collections.abc import KeysView
from typing import Literal

from trio_llm.server.parsing.readable_json import valid_text

State = Literal["before_key", "key", "before_colon", "before_value", "value", "after_value", "done", "broken"]
_SPACE = " \t\r\n"


class ObjectReader:
    """Reads one object, character by character.

    Attributes:
        done: The object is complete; `rest` is the text after it.
        broken: The text is not a JSON object.
    """

    def __init__(self) -> None:
        self.rest = ""
        # Positions in one list of characters: appending to strings would take quadratic time for long arguments.
        self._characters: list[str] = []
        self._spans: dict[str, tuple[int, int | None]] = {}
        self._state: State = "before_key"
        self._opened = False
        self._key = ""
        self._depth = 0
        self._in_string = False
        self._escaped = False

    @property
    def done(self) -> bool:
        return self._state == "done"

    @property
    def broken(self) -> bool:
        return self._state == "broken"

    @property
    def text(self) -> str:
        """All text so far, without `rest`."""
        return "".join(self._characters)

    @property
    def keys(self) -> KeysView[str]:
        """The top-level keys whose values have begun, in order."""
        return self._spans.keys()

    def text_from(self, start: int) -> str:
        """Return `text[start:]` without building the rest."""
        return "".join(self._characters[start:])

    def raw(self, key: str, start: int = 0) -> str:
        """Return the text of a value so far, from its `start`-th character on."""
        begin, end = self._spans.get(key, (0, 0))
        return "".join(self._characters[begin + start : end])

    def first(self, key: str) -> str:
        """Return the first character of a value; empty before it begins."""
        return self._characters[self._spans[key][0]] if key in self._spans else ""

    def complete(self, key: str) -> str:
        """Return the text of a value; empty until it is complete."""
        return "" if self._spans.get(key, (0, None))[1] is None else self.raw(key)

    def string(self, key: str) -> str | None:
        """Return a complete string value, as text that can be written; None if it is incomplete or not a string."""
        if self.first(key) != '"':
            return None
        try:
            return valid_text(json.loads(self.complete(key)))
        except ValueError:
            return None

    def feed(self, text: str) -> None:
        """Add text; text after the end of the object goes to `rest`."""
        for at, character in enumerate(text):
            if self._state in ("done", "broken"):
                self.rest += text[at:]
                return
            self._characters.append(character)
            self._step(character)

    def _step(self, character: str) -> None:
        if self._in_string:
            self._in_text(character)
        elif self._state == "value":
            self._in_value(character)
        elif character not in _SPACE:
            self._between(character)

    def _in_text(self, character: str) -> None:
        """Continue inside a string, of a key or a value."""
        if self._state == "key":
            self._key += character
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            self._in_string = False
            if self._state == "key":
                self._end_key()
            elif self._depth == 0:
                self._end_value(0)

    def _in_value(self, character: str) -> None:
        """Continue inside a value that is not a string, or between the strings of a nested one."""
        if self._depth == 0 and character in ",}":
            self._end_value(1)
            self._between(character)
        elif self._depth == 0 and character in _SPACE:
            self._end_value(1)
        else:
            self._in_string = character == '"'
            self._depth += (character in "{[") - (character in "}]")
            if self._depth == 0 and character in "}]":
                self._end_value(0)

    def _between(self, character: str) -> None:
        """Consume the one character that is allowed here, or mark the object as broken."""
        state = self._state
        if not self._opened and character == "{":
            self._opened = True
        elif state == "before_key" and self._opened and character == '"':
            self._state, self._key, self._in_string = "key", '"', True
        elif state == "before_colon" and character == ":":
            self._state = "before_value"
        elif state == "before_value" and character not in ",}]:":
            self._begin_value(character)
        elif state == "after_value" and character == ",":
            self._state = "before_key"
        elif character == "}" and self._opened and (state == "after_value" or not self._spans):
            self._state = "done"
        else:
            self._state = "broken"

    def _begin_value(self, character: str) -> None:
        self._state = "value"
        self._spans[self._key] = (len(self._characters) - 1, None)
        self._in_string = character == '"'
        self._depth = int(character in "{[")

    def _end_key(self) -> None:
        try:
            self._key = json.loads(self._key)
            self._state = "before_colon"
        except ValueError:
            self._state = "broken"

    def _end_value(self, beyond: int) -> None:
        """Close the value; the last `beyond` characters do not belong to it."""
        self._spans[self._key] = (self._spans[self._key][0], len(self._characters) - beyond)
        self._state = "after_value"


class ControlEscaper:
    """Escapes the control characters inside the strings of a JSON text.

    Models write line breaks there as they are, which no JSON parser accepts.
    """

    def __init__(self) -> None:
        self._in_string = False
        self._escaped = False

    def feed(self, text: str) -> str:
        """Return the next part of the text, escaped."""
        return "".join(map(self._escape, text))

    def _escape(self, character: str) -> str:
        escapes = self._in_string and not self._escaped and character == "\\"
        if character == '"' and not self._escaped:
            self._in_string = not self._in_string
        self._escaped = escapes
        return json.dumps(character)[1:-1] if self._in_string and character < " " else character
