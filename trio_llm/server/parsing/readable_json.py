"""Read as much as possible of an incomplete or invalid JSON object: a model wrote it, and may have been cut short."""

from __future__ import annotations

import json
import re
from typing import Any, cast

from trio_llm.config import LimitsConfig
from trio_llm.server.bodies.strict_json import check_nesting

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*+(?P<closed>"?)|[\[\]{},:]', re.DOTALL)
_BROKEN_ESCAPE = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?\Z")
_CLOSERS = {"{": "}", "[": "]"}
# Each round drops the text after an error; text with more errors is read up to that of the last round.
_MAX_ERRORS = 4


def readable_object(text: str, limits: LimitsConfig) -> tuple[dict[str, Any], bool]:
    """Return the object in `text`, or as much of its beginning as is valid, and whether it is complete.

    Raises:
        InvalidRequestError: The text is nested more deeply than the limit of bodies.
    """
    check_nesting(text.encode(errors="replace"), limits)
    if not text.strip():
        return {}, True  # Of a call without arguments.
    value, wrong_at = _parsed(text)
    for _ in range(_MAX_ERRORS):
        if wrong_at is None:
            break
        for candidate in _completed(text):
            value, wrong_at = _parsed(candidate)
            if wrong_at is None:
                return value, False
        text = text[:wrong_at]
    return value, wrong_at is None


def _parsed(text: str) -> tuple[dict[str, Any], int | None]:
    """Return the object, or the position of the error; for other JSON that is 0."""
    try:
        value: object = json.loads(text)
    except json.JSONDecodeError as error:
        return {}, error.pos
    except ValueError:  # A number with thousands of digits.
        return {}, 0
    return (_valid_unicode(cast(Any, value)), None) if isinstance(value, dict) else ({}, 0)


def _completed(text: str) -> list[str]:
    """Return completions of an incomplete text: with its last string closed, and without its last element."""
    closers = ""
    sound, sound_closers = 0, ""  # Up to here all elements are complete.
    is_open = False
    for token in _TOKEN.finditer(text):
        mark = token[0]
        if mark in _CLOSERS:
            closers = _CLOSERS[mark] + closers
            sound, sound_closers = token.end(), closers
        elif closers and mark == closers[0]:
            closers = closers[1:]
            sound, sound_closers = token.end(), closers
        elif mark == ",":
            sound, sound_closers = token.start(), closers
        is_open = mark[0] == '"' and not token["closed"]
    ended = _BROKEN_ESCAPE.sub("", text) + '"' if is_open else text
    return [ended + closers, text[:sound] + sound_closers]


def _valid_unicode(value: object) -> dict[str, Any]:
    """Replace lone surrogates, which JSON can encode and tokenizers cannot."""
    text = json.dumps(value, ensure_ascii=False)
    if not text.isascii():
        valid = valid_text(text)
        value = value if valid == text else json.loads(valid)
    return cast("dict[str, Any]", value)


def valid_text(text: str) -> str:
    """Return the text with lone surrogates replaced, and pairs of them joined: so it can be written as UTF-8."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
