"""Values against type annotations, for callers in Python whom no type checker has told."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping, Sequence
from types import UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin

# `Literal[...] | None` is of the older kind.
_UNIONS = (Union, UnionType)
_NUMBERS = {int: numbers.Integral, float: numbers.Real}


def is_a(value: object, hint: Any) -> bool:
    """Return whether a value is of an annotated type: int is a float, a list a tuple, and bool no number."""
    if hint is Any:
        return True
    kind, arguments = get_origin(hint), get_args(hint)
    if kind is Literal:
        return value in arguments
    if kind in _UNIONS:
        return any(is_a(value, one) for one in arguments)
    if kind in (tuple, Sequence):
        items = cast("Iterable[object]", value)
        return isinstance(value, list | tuple) and all(is_a(item, arguments[0]) for item in items)
    if kind is Mapping:
        pairs = cast("Mapping[object, object]", value)
        return isinstance(value, Mapping) and all(
            is_a(key, arguments[0]) and is_a(item, arguments[1]) for key, item in pairs.items()
        )
    if isinstance(value, bool):
        return hint is bool
    if getattr(hint, "_is_protocol", False):
        return all(hasattr(value, name) for name in vars(hint) if not name.startswith("_"))
    return isinstance(value, _NUMBERS.get(hint, hint))


def spelled(hint: Any) -> str:
    """Return the name of an annotated type, for error messages."""
    kind, arguments = get_origin(hint), get_args(hint)
    if kind is Literal:
        return " or ".join(map(repr, arguments))
    if kind in _UNIONS:
        return " or ".join(map(spelled, arguments))
    if kind in (tuple, Sequence):
        return f"a list of {spelled(arguments[0])}"
    if kind is Mapping:
        return f"a dict of {spelled(arguments[0])} to {spelled(arguments[1])}"
    return "None" if hint is type(None) else hint.__name__
