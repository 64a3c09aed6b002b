"""Parse strict JSON: refuse what Python's parser accepts but the JSON standard or our limits do not."""

from __future__ import annotations

import json
import math
import re
from functools import cache
from typing import Any, NoReturn, cast

from trio_llm.config import LimitsConfig
from trio_llm.errors import InvalidRequestError
from trio_llm.server.bodies.size_limits import too_much

_STRING = rb'"(?:[^"\\]++|\\.)*+"?'
_OTHER = rb'[^"\[\]{}]*+'
# One match per bracket: a million short strings cost few matches, and no match holds other threads for long. The end
# matches too: a failed search would restart at every byte.
_NEXT_BRACKET = re.compile(_OTHER + rb"(?:" + _STRING + _OTHER + rb"){0,4096}+([\[\]{}]|)", re.DOTALL)
_STRING_OR_KEY = re.compile(_STRING + rb"(\s*+:)?", re.DOTALL)
_DIGITS_TO_ZERO = bytes.maketrans(b"123456789", b"000000000")
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_object(body: bytes, limits: LimitsConfig) -> dict[str, Any]:
    """Parse a JSON object strictly.

    Raises:
        InvalidRequestError: Not UTF-8, not JSON, not an object, a duplicate key, NaN or infinity, a number out of
            range, a lone surrogate, or a limit exceeded.
    """
    check_nesting(body, limits)
    _check_keys(body, limits.max_json_keys)
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


def check_nesting(body: bytes, limits: LimitsConfig) -> None:
    """Refuse JSON with more depth or more arrays and objects than `limits` allows, before it is parsed."""
    depth = containers = 0
    for match in _NEXT_BRACKET.finditer(body):
        if match[1] in {b"[", b"{"}:
            depth += 1
            containers += 1
            if depth > limits.max_json_depth:
                raise too_much("The request body is nested too deeply", limits.max_json_depth, "max_json_depth")
            if containers > limits.max_json_nodes:
                what = "The request body holds too many arrays and objects"
                raise too_much(what, limits.max_json_nodes, "max_json_nodes")
        elif match[1]:
            depth -= 1


def _check_keys(body: bytes, most: int) -> None:
    """Refuse more than `most` keys: the parser lets no other thread run, and takes most of its time for keys."""
    if body.count(b":") <= most:
        return
    num_keys = 0
    for match in _STRING_OR_KEY.finditer(body):
        num_keys += match[1] is not None
        if num_keys > most:
            raise too_much("The request body holds too many keys", most, "max_json_keys")


def _check_digits(body: bytes, max_digits: int) -> None:
    """Refuse integers of more than `max_digits` digits: parsing takes quadratic time."""
    if body.translate(_DIGITS_TO_ZERO).find(b"0" * (max_digits + 1)) < 0:
        return
    for match in _string_or_long_number(max_digits).finditer(body):  # Digits in a string or a fraction are fine.
        if match[0][:1] != b'"':
            raise too_much("The request body holds a whole number of too many digits", max_digits, "max_json_digits")


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
    """Refuse lone surrogates: JSON can encode them, UTF-8 and tokenizers cannot."""
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
