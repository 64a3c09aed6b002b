"""Descriptions of types and fields for the OpenAPI document, from the docstrings of the types."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

from msgspec import Struct

_FIELD = re.compile(r"(?P<names>\w+(?:, \w+)*): (?P<text>.+)")


def describe(schemas: dict[str, Any]) -> None:
    """Add descriptions to the schemas of types, by the types' names, which are unique within the server."""
    types = {kind.__name__: kind for kind in _subclasses(Struct)}
    for name, schema in schemas.items():
        schema["description"] = _sections(types[name])[0]
        texts = field_descriptions(types[name])
        if (tag := types[name].__struct_config__.tag_field) is not None:
            texts = {tag: "Kind of the object.", **texts}
        for field, part in schema.get("properties", {}).items():
            if field in texts:
                part["description"] = texts[field]


@cache
def field_descriptions(kind: type[Struct]) -> dict[str, str]:
    """Return the description of each field by its JSON name; base classes' fields too."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if issubclass(base, Struct) and base is not Struct:
            found |= _fields(_sections(base)[1])
    return found


def _subclasses(kind: type[Struct]) -> Iterator[type[Struct]]:
    for subclass in kind.__subclasses__():
        if subclass.__module__.startswith("trio_llm.server."):
            yield subclass
        yield from _subclasses(subclass)


def _sections(kind: type[Struct]) -> tuple[str, str]:
    """Return a docstring's text and its Attributes section."""
    text, _, attributes = inspect.cleandoc(kind.__doc__ or "").partition("\n\nAttributes:\n")
    return text, attributes


def _fields(attributes: str) -> dict[str, str]:
    found: dict[str, str] = {}
    # A line with deeper indentation continues the line before it.
    for entry in re.sub(r"\n {5,}", " ", attributes).splitlines():
        if match := _FIELD.fullmatch(entry.strip()):
            found |= dict.fromkeys(match["names"].split(", "), match["text"])
    return found
