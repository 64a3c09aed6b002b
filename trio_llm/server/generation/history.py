"""Convert a request's messages for templates: content as one text, arguments as objects, valid call ids."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Sequence
from typing import Any

import attrs
import msgspec

from trio_llm.config import LimitsConfig
from trio_llm.errors import InvalidRequestError
from trio_llm.server.bodies.tools import CalledFunction, ToolCall
from trio_llm.server.bodies.types import Message
from trio_llm.server.parsing.readable_json import readable_object
from trio_llm.server.parsing.tools import ToolForm

# Mistral's templates raise an exception for any other.
_MISTRAL_ID = re.compile(r"[a-zA-Z0-9]{9}")


@attrs.frozen
class History:
    """Messages for a template.

    Attributes:
        messages: As `ChatTemplate.render` takes them.
        unreadable: Paths of arguments that are not a complete JSON object; the messages have their readable part.
    """

    messages: list[dict[str, Any]]
    unreadable: list[str]


def history(messages: Sequence[Message], form: ToolForm | None, limits: LimitsConfig) -> History:
    """Return messages for the template of a model with this form of calls.

    Raises:
        InvalidRequestError: A part has no text, or arguments are nested too deeply; names the field.
    """
    converted = History([], [])
    for index, message in enumerate(messages):
        converted.messages.append(_flat(message, f"messages[{index}]", form, limits, converted.unreadable))
    return converted


def text_of(message: Message, path: str) -> str:
    """Return a message's content as one text. Raises InvalidRequestError for a part without text."""
    if not isinstance(message.content, list):
        return message.content or message.refusal or ""
    for index, part in enumerate(message.content):
        if part.text is None:
            where = f"{path}.content[{index}]"
            raise InvalidRequestError(f"'{where}': a part needs its text.", param=where)
    return "\n".join(part.text or "" for part in message.content)


def new_call_id(form: ToolForm | None) -> str:
    """Draw a call id that the model's template accepts when the client sends it back."""
    return secrets.token_hex(5)[:9] if form == "mistral" else f"call_{secrets.token_hex(12)}"


def as_function(call: ToolCall) -> CalledFunction:
    """Return the call as one of a function: to the model a custom tool is one with the argument `input`."""
    if call.custom is not None:
        return CalledFunction(name=call.custom.name, arguments={"input": call.custom.input})
    assert call.function is not None
    return call.function


def _flat(
    message: Message, path: str, form: ToolForm | None, limits: LimitsConfig, unreadable: list[str]
) -> dict[str, Any]:
    flat: dict[str, Any] = {key: value for key, value in msgspec.structs.asdict(message).items() if value}
    flat.pop("refusal", None)
    flat["content"] = text_of(message, path)
    if message.tool_calls:
        calls: list[dict[str, Any]] = []
        for index, call in enumerate(message.tool_calls):
            where = f"{path}.tool_calls[{index}].function.arguments"
            called = as_function(call)
            arguments, is_whole = _arguments(called, where, limits)
            if not is_whole:
                unreadable.append(where)
            function = {"name": called.name, "arguments": arguments}
            calls.append({"id": _accepted_id(call.id, form), "type": "function", "function": function})
        flat["tool_calls"] = calls
    if message.tool_call_id:
        flat["tool_call_id"] = _accepted_id(message.tool_call_id, form)
    if message.reasoning and not message.reasoning_content:
        flat["reasoning_content"] = message.reasoning
    return flat


def _arguments(called: CalledFunction, path: str, limits: LimitsConfig) -> tuple[dict[str, Any], bool]:
    given = called.arguments
    if isinstance(given, dict):
        return given, True
    try:
        return readable_object(given, limits)
    except InvalidRequestError as error:
        raise InvalidRequestError(f"'{path}': {error.message}", param=path) from None


def _accepted_id(call_id: str | None, form: ToolForm | None) -> str | None:
    """Return an id that the template accepts: the same for a call and its result."""
    if form != "mistral" or _MISTRAL_ID.fullmatch(call_id or ""):
        return call_id
    return hashlib.sha256((call_id or "").encode()).hexdigest()[:9]
