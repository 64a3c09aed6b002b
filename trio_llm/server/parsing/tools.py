"""Split tool calls from the text while it streams, in the forms of open models.

hermes    <tool_call>{"name": ..., "arguments": {...}}</tool_call>          Qwen2.5, Qwen3, Hermes
llama3    {"name": ..., "parameters": {...}}, after <|python_tag|> or bare   Llama 3.x
mistral   [TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]
          [TOOL_CALLS]name[CALL_ID]...[ARGS]{...}                            Mistral, Mixtral; old and new
gemma4    <|tool_call>call:name{key:<|"|>text<|"|>}<tool_call|>              Gemma 4: see `gemma_calls`

Small models write variations of these, which are calls too: a code fence round the object, a list of objects, OpenAI's
{"type": "function", "function": {...}}, arguments that are null or the text of an object, and line breaks in strings.

Other text becomes content, unchanged. Regular expressions are not used: the text is untrusted, and parsing must take
linear time.
"""

from __future__ import annotations

import json
from typing import Literal

from trio_llm.server.parsing import gemma_calls
from trio_llm.server.parsing.json_object import ControlEscaper, ObjectReader
from trio_llm.server.parsing.pieces import CallArguments, CallStart, Content, Piece, merge, split_at

JsonForm = Literal["hermes", "llama3", "mistral"]
ToolForm = JsonForm | Literal["gemma4"]
_ARGUMENT_KEYS = ("arguments", "parameters")
_MARKERS: dict[JsonForm, str] = {"hermes": "<tool_call>", "llama3": "<|python_tag|>", "mistral": "[TOOL_CALLS]"}
CALL_MARKERS: dict[ToolForm, str] = {**_MARKERS, "gemma4": gemma_calls.OPEN}
# What may stand between the marker and a call, or between calls.
_TAGS: dict[JsonForm, tuple[str, ...]] = {
    "hermes": ("<tool_call>", "</tool_call>", "json"),
    "llama3": (),
    "mistral": ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
}
# Everything a parser must see, also where it is a control token.
MARKERS: dict[ToolForm, tuple[str, ...]] = {
    "gemma4": gemma_calls.MARKERS,
    **{form: (marker, *_TAGS[form]) for form, marker in _MARKERS.items()},
}
_SEPARATORS: dict[JsonForm, str] = {"hermes": " \t\r\n`,[]", "llama3": " \t\r\n;,[]", "mistral": " \t\r\n,[]"}
_MAX_NAME_CHARS = 128
_SPACE = " \t\r\n"


def tool_form(chat_template: str | None) -> ToolForm | None:
    """Return how a model writes tool calls, from its chat template; None if the template has no tools."""
    template = chat_template or ""
    if gemma_calls.OPEN in template:
        return "gemma4"
    if "[TOOL_CALLS]" in template:
        return "mistral"
    if "<tool_call>" in template:
        return "hermes"
    if "<|python_tag|>" in template or '{"name": function name, "parameters"' in template:
        return "llama3"
    return None


def tool_parser(form: ToolForm) -> ToolParser | gemma_calls.GemmaCalls:
    """Return a parser of one message."""
    return gemma_calls.GemmaCalls() if form == "gemma4" else ToolParser(form)


class ToolParser:
    """Splits one message into content and tool calls, a character at a time, so that chunk boundaries do not matter.

    Attributes:
        num_calls: Calls found so far.
    """

    def __init__(self, form: JsonForm) -> None:
        self._form: JsonForm = form
        # "start" only for Llama, which may begin with a bare call; "calls" is between the marker and the end of calls.
        self._state: Literal["start", "text", "calls", "object"] = "start" if form == "llama3" else "text"
        self._pieces: list[Piece] = []
        # White space or the bracket of a bare list: part of a call if one follows, else of the text. It and `_before`
        # are lists, as adding to a string character by character takes quadratic time.
        self._space: list[str] = []
        self._held = ""  # What may become a marker or a tag.
        self._before: list[str] = []  # Everything since the marker or the last call; content if no call follows.
        self._name = ""  # Of a call whose name stands before its object.
        self._in_id = False
        self._follows_call = False
        self._reader = ObjectReader()
        self._escaper = ControlEscaper()
        self._inner: ObjectReader | None = None  # Reads the value of "function", where that is an object.
        self._bare = False
        self._name_given = False
        self._sent = 0
        self.num_calls = 0

    def feed(self, text: str) -> list[Piece]:
        """Add text and return the pieces that are certain."""
        for character in text:
            self._step(character)
        pieces, self._pieces = merge(self._pieces), []
        return pieces

    def finish(self) -> list[Piece]:
        """Return the rest at the end of the text.

        An incomplete call stays as far as it was sent; one that ends before its name is dropped with its marker.
        """
        if self._state == "object" and self._bare and not self._name_given:  # Maybe an answer in JSON.
            self._emit(*self._before, self._reader.text)
        elif self._state in ("start", "text"):
            self._emit(*self._space, self._held)
        pieces, self._pieces = merge(self._pieces), []
        return pieces

    def _emit(self, *texts: str) -> None:
        if text := "".join(texts):
            self._pieces.append(Content(text))

    def _step(self, character: str) -> None:
        match self._state:
            case "text":
                self._in_text(character)
            case "object":
                self._in_object(character)
            case "calls":
                self._in_calls(character)
            case "start":
                self._at_start(character)

    def _at_start(self, character: str) -> None:
        if character in _SPACE or (character == "[" and "[" not in self._space):
            self._space.append(character)
        elif character == "{":
            self._before, self._space = self._space, []
            self._open_object(bare=True)
        else:
            self._state = "text"
            self._step(character)

    def _in_text(self, character: str) -> None:
        text, marker, self._held = split_at(self._held + character, [CALL_MARKERS[self._form]])
        for char in text:
            if self._form == "hermes" and char in _SPACE:
                self._space.append(char)
            else:
                self._emit(*self._space, char)
                self._space = []
        if marker:
            self._before, self._space, self._state = [*self._space, marker], [], "calls"
            self._follows_call = False

    def _in_calls(self, character: str) -> None:
        """Skip text around calls until the next one begins or it is certain that none follows."""
        tags = _TAGS[self._form]
        self._held += character
        if self._held in tags:
            self._take_tag(self._held)
        elif any(tag.startswith(self._held) for tag in tags):
            return
        elif len(self._held) == 1:
            self._held = ""
            self._take_between(character)
        elif self._held[0] in _SEPARATORS[self._form] and not self._name:
            # A bracket that begins a list of calls, not a tag.
            held, self._held = self._held, ""
            self._before.append(held[0])
            for again in held[1:]:
                self._step(again)
        else:
            self._no_call()

    def _take_tag(self, tag: str) -> None:
        self._held = ""
        self._before.append(tag)
        if tag == "</tool_call>":
            self._before, self._state = [], "text"
        elif tag == "[TOOL_CALLS]":
            self._name, self._in_id = "", False
        elif tag == "[CALL_ID]":
            self._in_id = True

    def _take_between(self, character: str) -> None:
        if character == "{":
            self._open_object(bare=False)
        elif character in _SEPARATORS[self._form] and not self._name:
            self._before.append(character)
        elif self._form == "mistral" and self._is_of_name(character):
            self._before.append(character)
            self._name += "" if self._in_id else character
        else:
            self._held = character
            self._no_call()

    def _is_of_name(self, character: str) -> bool:
        return (character.isalnum() or character in "_-.") and (self._in_id or len(self._name) < _MAX_NAME_CHARS)

    def _no_call(self) -> None:
        """Return the text after the marker as content; its end may begin another marker."""
        # After a call, the end of a list of calls is not content.
        before = "".join(self._before)
        self._emit(before.lstrip(_SEPARATORS[self._form]) if self._follows_call else before)
        held, self._held, self._before, self._name, self._in_id, self._state = self._held, "", [], "", False, "text"
        for character in held:
            self._step(character)

    def _open_object(self, *, bare: bool) -> None:
        self._reader, self._inner, self._escaper = ObjectReader(), None, ControlEscaper()
        self._bare, self._name_given, self._sent = bare, False, 0
        self._state = "object"
        self._step("{")

    def _in_object(self, character: str) -> None:
        reader = self._reader
        reader.feed(character)
        if self._inner is None and reader.first("function") == "{":
            self._inner = ObjectReader()
        if self._inner is not None:
            self._inner.feed(character)
        fields = self._inner or reader
        if not self._name_given:
            self._find_name(fields)
        if self._name_given:
            self._send_arguments(fields)
        if reader.broken and not self._name_given:
            self._emit(*self._before, reader.text[:-1])
            self._close("text")
            self._step(character)
        elif reader.broken or reader.done:
            if not self._name_given:
                self._emit(*self._before, reader.text)
            self._close("calls" if self._name_given else "text")
        elif self._bare and not self._name_given and self._is_an_answer(reader):
            self._emit(*self._before, reader.text)
            self._close("text")

    def _find_name(self, fields: ObjectReader) -> None:
        name = self._name or fields.string("name") or self._reader.string("function")
        if name and self._bare:
            # A JSON answer may also have a name: wait for the key that makes it a call.
            calls = any(key in _ARGUMENT_KEYS for key in fields.keys)
            name = name if calls or (self._reader.done and not self._is_an_answer(self._reader)) else None
        if name:
            self._pieces.append(CallStart(self.num_calls, name))
            self.num_calls += 1
            self._name_given = True

    @staticmethod
    def _is_an_answer(reader: ObjectReader) -> bool:
        known = {"name", "type", "function", *_ARGUMENT_KEYS}
        return any(key not in known for key in reader.keys)

    def _send_arguments(self, fields: ObjectReader) -> None:
        key = next((key for key in _ARGUMENT_KEYS if key in fields.keys), None)
        if self._name:
            text = fields.text_from(self._sent)
        elif key is None:
            text = ""
        elif fields.first(key) == "{":
            text = fields.raw(key, self._sent)
        else:
            text = "" if self._sent else _whole_arguments(fields, key)
        if not text and self._reader.done and not self._sent:
            text = "{}"
        if text:
            self._pieces.append(CallArguments(self.num_calls - 1, self._escaper.feed(text)))
            self._sent += len(text)

    def _close(self, state: Literal["text", "calls"]) -> None:
        self._state, self._before, self._name, self._in_id = state, [], "", False
        self._follows_call = state == "calls"


def _whole_arguments(fields: ObjectReader, key: str) -> str:
    """Return arguments that are not an object; empty until they are complete."""
    if (text := fields.string(key)) is not None:
        return (text if _is_object(text) else fields.raw(key)) if text else "{}"
    raw = fields.complete(key)
    return "{}" if raw == "null" else raw


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
