"""A request body as checked JSON: everything that JSON parsers let through and nobody wants stops here."""

from __future__ import annotations

import json
import math
import re
from functools import cache
from typing import Any, NoReturn, TypeVar, cast

import msgspec

from trio_llm.config import LimitsConfig
from trio_llm.errors import InvalidRequestError
from trio_llm.server.amounts import too_much
from trio_llm.server.errors import HttpError

T = TypeVar("T")

_STRING = rb'"(?:[^"\\]++|\\.)*+"?'
_STRING_OR_BRACKET = re.compile(_STRING + rb"|[\[\]{}]", re.DOTALL)
_DIGITS_TO_ZERO = bytes.maketrans(b"123456789", b"000000000")
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
_AT_PATH = re.compile(r"(?P<what>.*?)(?: - at (?:`key` in )?`\$\.?(?P<path>.*)`)?", re.DOTALL)


def check_media_type(content_type: str | None, content_encoding: str | None) -> None:
    """Refuse what is not plain JSON by its headers.

    Only `application/json` makes browsers ask first (CORS preflight), so that no web page can post to a local
    server; only `identity` means that no small body unpacks into a large one.
    """
    if content_encoding not in {None, "", "identity"}:
        raise HttpError(415, f"Content-Encoding {content_encoding!r} is not supported: send the body uncompressed.")
    if (content_type or "").partition(";")[0].strip().lower() != "application/json":
        raise HttpError(415, "Unsupported Media Type: only 'application/json' is allowed.")


def parse_object(body: bytes, limits: LimitsConfig) -> dict[str, Any]:
    """Parse a JSON object strictly.

    Raises:
        InvalidRequestError: Not UTF-8, not JSON, not an object, a duplicate key, NaN or infinity, a number out of
            range, half a surrogate pair, or more of anything than `limits` allows.
    """
    _check_nesting(body, limits)
    _check_digits(body, limits.max_json_digits)
    try:
        text = body.decode()
        value = json.loads(
            text, parse_constant=_refuse_constant, parse_float=_finite_float, object_pairs_hook=_unique_keys
        )
    except UnicodeDecodeError:
        raise InvalidRequestError("The request body is not valid UTF-8.") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise InvalidRequestError(f"The request body is not valid JSON: {error.msg} at {where}.") from None
    if not isinstance(value, dict):
        raise InvalidRequestError("The request body must be a JSON object.")
    if _SURROGATE_ESCAPE.search(body):
        _check_unicode(cast(Any, value), "")
    return cast("dict[str, Any]", value)


def convert(value: Any, kind: type[T]) -> T:
    """Check `value` against a msgspec type.

    Raises:
        InvalidRequestError: Names the path of the field that does not fit.
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise _readable(str(error)) from None


def _readable(error: str) -> InvalidRequestError:
    match = _AT_PATH.fullmatch(error)
    what, path = (match["what"], match["path"]) if match else (error, None)
    if missing := re.fullmatch(r"Object missing required field `(\w+)`", what):
        path = f"{path}.{missing[1]}" if path else missing[1]
        return InvalidRequestError(f"Missing required parameter: '{path}'.", param=path)
    what = what.replace(" | null", "")
    return InvalidRequestError(f"Invalid value for '{path}': {what[0].lower()}{what[1:]}.", param=path)


def _check_nesting(body: bytes, limits: LimitsConfig) -> None:
    depth = containers = 0
    for match in _STRING_OR_BRACKET.finditer(body):
        token = match[0]
        if token in b"[{":
            depth += 1
            containers += 1
            if depth > limits.max_json_depth:
                raise too_much("The request body is nested too deeply", limits.max_json_depth, "max_json_depth")
            if containers > limits.max_json_nodes:
                what = "The request body holds too many arrays and objects"
                raise too_much(what, limits.max_json_nodes, "max_json_nodes")
        elif token in b"]}":
            depth -= 1


def _check_digits(body: bytes, most: int) -> None:
    """Refuse long whole numbers, which cost the square of their length to read."""
    if body.translate(_DIGITS_TO_ZERO).find(b"0" * (most + 1)) < 0:
        return
    for match in _string_or_long_number(most).finditer(body):  # The digits may stand in a string or a fraction.
        if match[0][:1] != b'"':
            raise too_much("The request body holds a whole number of too many digits", most, "max_json_digits")


@cache
def _string_or_long_number(digits: int) -> re.Pattern[bytes]:
    return re.compile(_STRING + rb"|(?<![.0-9])[0-9]{%d,}+(?![.eE])" % (digits + 1), re.DOTALL)


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidRequestError(f"{name} is not a JSON number.")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise InvalidRequestError(f"The number {text[:30]} is out of range.")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise InvalidRequestError(f"The key {key[:64]!r} occurs twice.", param=key[:64])
            seen.add(key)
    return result


def _check_unicode(value: Any, path: str) -> None:
    """Refuse half surrogate pairs: JSON can spell them, UTF-8 and tokenizers cannot."""
    match value:
        case str():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise InvalidRequestError(
                    f"'{path}' is not valid Unicode: it has half a surrogate pair.", param=path
                ) from None
        case list():
            for index, item in enumerate(cast("list[Any]", value)):
                _check_unicode(item, f"{path}[{index}]")
        case dict():
            for key, item in cast("dict[str, Any]", value).items():
                _check_unicode(key, path or "a key")
                _check_unicode(item, f"{path}.{key}" if path else key)
        case _:
            pass
