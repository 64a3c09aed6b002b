"""Tool calls in the three forms that open models write them, split from the text while it streams.

hermes    <tool_call>{"name": ..., "arguments": {...}}</tool_call>          Qwen2.5, Qwen3, Hermes
llama3    {"name": ..., "parameters": {...}}, after <|python_tag|> or bare   Llama 3.x
mistral   [TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]
          [TOOL_CALLS]name[ARGS]{...}                                        Mistral, Mixtral; old and new

What turns out not to be a call is handed on as content, unchanged. No regular expressions: the text is the model's,
and the time spent on it must be linear.
"""

from __future__ import annotations

from typing import Literal

from trio_llm.server.parsing.json_object import ObjectReader
from trio_llm.server.parsing.pieces import CallArguments, CallStart, Content, Piece, merge, split_at

ToolForm = Literal["hermes", "llama3", "mistral"]
_ARGUMENT_KEYS = ("arguments", "parameters")
_MARKERS: dict[ToolForm, str] = {"hermes": "<tool_call>", "llama3": "<|python_tag|>", "mistral": "[TOOL_CALLS]"}
# What may stand between the marker and a call, or between calls.
_TAGS: dict[ToolForm, tuple[str, ...]] = {
    "hermes": ("<tool_call>", "</tool_call>"),
    "llama3": (),
    "mistral": ("[TOOL_CALLS]", "[ARGS]"),
}
# Everything a parser must see, also where it is a control token.
MARKERS: dict[ToolForm, tuple[str, ...]] = {form: (marker, *_TAGS[form]) for form, marker in _MARKERS.items()}
_SEPARATORS: dict[ToolForm, str] = {"hermes": " \t\r\n", "llama3": " \t\r\n;", "mistral": " \t\r\n,[]"}
_SPACE = " \t\r\n"


def tool_form(chat_template: str | None) -> ToolForm | None:
    """Tell from its chat template how a model writes tool calls; None if the template knows no tools."""
    template = chat_template or ""
    if "[TOOL_CALLS]" in template:
        return "mistral"
    if "<tool_call>" in template:
        return "hermes"
    if "<|python_tag|>" in template or '{"name": function name, "parameters"' in template:
        return "llama3"
    return None


class ToolParser:
    """Splits one message into content and tool calls, a character at a time: where the stream is cut cannot matter.

    Attributes:
        num_calls: Calls found so far.
    """

    def __init__(self, form: ToolForm) -> None:
        self._form: ToolForm = form
        # "start" only for Llama, which may begin with a bare call; "calls" is between the marker and the end of calls.
        self._state: Literal["start", "text", "calls", "object"] = "start" if form == "llama3" else "text"
        self._pieces: list[Piece] = []
        self._space = ""  # Blank space that belongs to a call if one follows, else to the text.
        self._held = ""  # What may become a marker or a tag.
        self._before = ""  # Everything since the marker, to be handed on if no call follows.
        self._name = ""  # Of a call whose name stands before its object.
        self._reader = ObjectReader()
        self._bare = False
        self._name_given = False
        self._sent = 0
        self.num_calls = 0

    def feed(self, text: str) -> list[Piece]:
        """Take in more text and return what it certainly is."""
        for character in text:
            self._step(character)
        pieces, self._pieces = merge(self._pieces), []
        return pieces

    def finish(self) -> list[Piece]:
        """Return what was held back when the text has ended. A call cut short stays as far as it was sent."""
        if self._state == "object" and not self._name_given:
            self._emit(self._before + self._reader.text)
        elif self._state in ("start", "text"):
            self._emit(self._space + self._held)
        elif self._state == "calls" and not self.num_calls:
            self._emit(self._before + self._name + self._held)
        pieces, self._pieces = merge(self._pieces), []
        return pieces

    def _emit(self, text: str) -> None:
        if text:
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
        if character in _SPACE:
            self._space += character
        elif character == "{":
            self._before, self._space = self._space, ""
            self._open_object(bare=True)
        else:
            self._state = "text"
            self._step(character)

    def _in_text(self, character: str) -> None:
        text, marker, self._held = split_at(self._held + character, [_MARKERS[self._form]])
        for shown in text:
            if self._form == "hermes" and shown in _SPACE:
                self._space += shown
            else:
                self._emit(self._space + shown)
                self._space = ""
        if marker:
            self._before, self._space, self._state = self._space + marker, "", "calls"

    def _in_calls(self, character: str) -> None:
        """Skip what stands round calls until the next one begins or it is clear that none does."""
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
            # An opening bracket that is no tag's: of a list of calls.
            held, self._held = self._held, ""
            self._before += held[0]
            for again in held[1:]:
                self._step(again)
        else:
            self._no_call()

    def _take_tag(self, tag: str) -> None:
        self._held = ""
        if tag == "</tool_call>":
            self._before, self._state = "", "text"
        elif tag != "[ARGS]":
            self._before, self._name = self._before + self._name + tag, ""

    def _take_between(self, character: str) -> None:
        if character == "{":
            self._open_object(bare=False)
        elif character in _SEPARATORS[self._form] and not self._name:
            self._before += character
        elif self._form == "mistral" and (character.isalnum() or character in "_-.") and len(self._name) < 64:
            self._name += character
        else:
            self._held = character
            self._no_call()

    def _no_call(self) -> None:
        """Hand on what followed the marker as text; the last few characters may begin another marker."""
        self._emit(self._name if self.num_calls else self._before + self._name)
        held, self._held, self._before, self._name, self._state = self._held, "", "", "", "text"
        for character in held:
            self._step(character)

    def _open_object(self, *, bare: bool) -> None:
        self._reader, self._bare, self._name_given, self._sent = ObjectReader(), bare, False, 0
        self._state = "object"
        self._step("{")

    def _in_object(self, character: str) -> None:
        reader = self._reader
        reader.feed(character)
        if not self._name_given:
            self._find_name(reader)
        if self._name_given:
            self._send_arguments(reader)
        if reader.broken and not self._name_given:
            self._emit(self._before + reader.text[:-1])
            self._close("text")
            self._step(character)
        elif reader.broken or reader.done:
            if not self._name_given:
                self._emit(self._before + reader.text)
            self._close("calls" if self._name_given else "text")
        elif self._bare and not self._name_given and self._is_an_answer(reader):
            self._emit(self._before + reader.text)
            self._close("text")

    def _find_name(self, reader: ObjectReader) -> None:
        name = self._name or reader.string("name")
        if name and self._bare:
            # A JSON answer may well have a name too: wait for the key that makes it a call.
            calls = any(key in _ARGUMENT_KEYS for key in reader.keys)
            name = name if calls or (reader.done and not self._is_an_answer(reader)) else None
        if name:
            self._pieces.append(CallStart(self.num_calls, name))
            self.num_calls += 1
            self._name_given = True

    @staticmethod
    def _is_an_answer(reader: ObjectReader) -> bool:
        known = {"name", "type", "function", *_ARGUMENT_KEYS}
        return any(key not in known for key in reader.keys)

    def _send_arguments(self, reader: ObjectReader) -> None:
        key = None if self._name else next((key for key in _ARGUMENT_KEYS if key in reader.keys), None)
        text = reader.text_from(self._sent) if self._name else reader.raw(key, self._sent) if key else ""
        if text:
            self._pieces.append(CallArguments(self.num_calls - 1, text))
            self._sent += len(text)
        elif reader.done and not self._sent:
            self._pieces.append(CallArguments(self.num_calls - 1, "{}"))

    def _close(self, state: Literal["text", "calls"]) -> None:
        self._state, self._before, self._name = state, "", ""
