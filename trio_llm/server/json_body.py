"""A request body as checked JSON: everything that JSON parsers let through and nobody wants stops here."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn, TypeVar, cast

import msgspec

from trio_llm.errors import InvalidRequestError
from trio_llm.server.errors import HttpError

T = TypeVar("T")

MAX_DEPTH = 32
# A number pulled out of the air: far above 2,048 messages of a few parts each, far below what takes long to walk.
MAX_CONTAINERS = 20_000

_STRING_OR_BRACKET = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', re.DOTALL)
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


def parse_object(body: bytes) -> dict[str, Any]:
    """Parse a JSON object strictly.

    Raises:
        InvalidRequestError: Not UTF-8, not JSON, not an object, a duplicate key, NaN or infinity, a number out of
            range, half a surrogate pair, nested deeper than MAX_DEPTH or holding more than MAX_CONTAINERS containers.
    """
    _check_nesting(body)
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
    except ValueError:  # Python's own limit on the digits of an integer
        raise InvalidRequestError("The request body holds a number with too many digits.") from None
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


def _check_nesting(body: bytes) -> None:
    depth = containers = 0
    for match in _STRING_OR_BRACKET.finditer(body):
        token = match[0]
        if token in b"[{":
            depth += 1
            containers += 1
            if depth > MAX_DEPTH or containers > MAX_CONTAINERS:
                raise InvalidRequestError(
                    f"The request body is nested too deeply or holds too much: at most {MAX_DEPTH} levels and "
                    f"{MAX_CONTAINERS} arrays and objects."
                )
        elif token in b"]}":
            depth -= 1


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
