"""A value of a wrong type or out of range, in the words of the API: the field, the value and what is allowed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import msgspec
from msgspec import Struct, inspect

from trio_llm.errors import InvalidRequestError

_AT_PATH = re.compile(r"(?P<what>.*?)(?: - at (?:`key` in )?`\$\.?(?P<path>.*)`)?", re.DOTALL)
_STEP = re.compile(r"\[(\d+)\]|(?:^|\.)(\w+)")
_UNKNOWN_VALUE = re.compile(r"Invalid (?:enum )?value '.*'", re.DOTALL)
_OUT_OF_RANGE = re.compile(r"Expected `(?:int|float)` [<>]=? \S+")


def field_error(error: msgspec.ValidationError, given: Mapping[str, Any], kind: type[Struct]) -> InvalidRequestError:
    """Return msgspec's error about a body as one that names field, value and what is allowed.

    Args:
        given: What could not be converted.
        kind: To what.
    """
    match = _AT_PATH.fullmatch(str(error))
    what, path = (match["what"], match["path"]) if match else (str(error), None)
    if missing := re.fullmatch(r"Object missing required field `(\w+)`", what):
        path = f"{path}.{missing[1]}" if path else missing[1]
        return InvalidRequestError(f"Missing required parameter: '{path}'.", param=path)
    what = what.replace(" | null", "")
    value, allowed = _look_up(path or "", given, kind)
    if _UNKNOWN_VALUE.fullmatch(what) and isinstance(value, str) and allowed:
        what = f"{value[:64]!r} is none of {', '.join(map(repr, allowed))}"
    elif _OUT_OF_RANGE.fullmatch(what) and isinstance(value, int | float):
        what = f"{what}, got {value}"
    return InvalidRequestError(f"Invalid value for '{path}': {what[0].lower()}{what[1:]}.", param=path)


def _look_up(path: str, given: Mapping[str, Any], kind: type[Struct]) -> tuple[Any, Sequence[Any]]:
    """Return the value at msgspec's path, and those that its type lists; None and none for keys that it leaves out."""
    value: Any = given
    types: list[inspect.Type] = [inspect.type_info(kind)]
    listed: list[Any] = []
    if not re.fullmatch(rf"(?:{_STEP.pattern})*", path):
        return None, ()
    for index, name in _STEP.findall(path):
        if index:
            types = _options(option.item_type for option in types if isinstance(option, inspect.ListType))
            value = value[int(index)]
            continue
        structs = [option for option in types if isinstance(option, inspect.StructType)]
        listed = [option.tag for option in structs if option.tag_field == name]
        fitting = [o for o in structs if o.tag_field is None or value.get(o.tag_field) == o.tag]
        types = _options(field.type for option in fitting for field in option.fields if field.encode_name == name)
        value = value.get(name)
    listed += [item for option in types if isinstance(option, inspect.LiteralType) for item in option.values]
    return value, tuple(dict.fromkeys(listed))


def _options(types: Iterable[inspect.Type]) -> list[inspect.Type]:
    """Return what values of these types may be, with unions taken apart."""
    found: list[inspect.Type] = []
    for info in types:
        found += cast("Sequence[inspect.Type]", info.types) if isinstance(info, inspect.UnionType) else (info,)
    return found
