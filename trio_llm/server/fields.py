"""Fields of a JSON body that no type knows, at any depth: names that change nothing must not pass in silence.

msgspec checks what it knows and skips the rest. This walks the same types beside the value, and only where objects
may stand: a body in order costs one comparison of key sets per object.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, TypeAlias, cast

import attrs
from msgspec import Struct, inspect

NotSupported: TypeAlias = Mapping[str, tuple[Any, ...]]
"""Names of fields that are refused -> the values that ask for nothing and are let pass."""


@attrs.frozen
class Stray:
    """A field that has no place where it stands; `refused` if it is known and asks for what nobody here can do."""

    path: str
    refused: bool

    def below(self, where: str) -> Stray:
        """Return it as seen from further out."""
        joint = "" if self.path.startswith("[") else "."
        return Stray(f"{where}{joint}{self.path}", self.refused)


_Walk: TypeAlias = Callable[[Any], Sequence[Stray]]


def stray_fields(value: Mapping[str, Any], kind: type[Struct], refused: NotSupported) -> Sequence[Stray]:
    """Return the fields in `value` that `kind` does not have, in order; null is the same as absent.

    Args:
        refused: Of the outermost object; those further in name theirs as `not_supported` in their class.
    """
    names, nested = _layout(kind)
    return (*_outside(value, names, refused), *_within(value, nested))


@cache
def _layout(kind: type[Struct]) -> tuple[frozenset[str], tuple[tuple[str, _Walk], ...]]:
    """Return the names of a kind's fields, and what walks those in which objects stand."""
    info = cast(inspect.StructType, inspect.type_info(kind))
    tag = (info.tag_field,) if info.tag_field is not None else ()
    nested = tuple((field.encode_name, walk) for field in info.fields if (walk := _walk(field.type)) is not None)
    return frozenset((*(field.encode_name for field in info.fields), *tag)), nested


def _outside(value: Mapping[str, Any], names: frozenset[str], refused: NotSupported) -> Sequence[Stray]:
    if names.issuperset(value):
        return ()
    return [
        Stray(name, refused=name in refused)
        for name, item in value.items()
        if name not in names and item is not None and item not in refused.get(name, ())
    ]


def _within(value: Mapping[str, Any], nested: Iterable[tuple[str, _Walk]]) -> Sequence[Stray]:
    found: list[Stray] = []
    for name, walk in nested:
        if name in value and (inner := walk(value[name])):
            found += [stray.below(name) for stray in inner]
    return found


def _walk(info: inspect.Type) -> _Walk | None:
    """Return what walks a value of a type; None where nothing in it can be unknown."""
    options = info.types if isinstance(info, inspect.UnionType) else (info,)
    structs = [option for option in options if isinstance(option, inspect.StructType)]
    lists = [option.item_type for option in options if isinstance(option, inspect.ListType)]
    objects = _objects_walk(structs) if structs else None
    items = next((found for item in lists if (found := _walk(item)) is not None), None)
    if objects is None and items is None:
        return None

    def walk(value: Any) -> Sequence[Stray]:
        if items is not None and isinstance(value, list):
            strays: list[Stray] = []
            for index, item in enumerate(cast("list[Any]", value)):
                if inner := items(item):
                    strays += [stray.below(f"[{index}]") for stray in inner]
            return strays
        return objects(value) if objects is not None and isinstance(value, dict) else ()

    return walk


def _objects_walk(structs: Sequence[inspect.StructType]) -> _Walk:
    """Return what walks an object of one of several kinds, told apart by their tags."""
    tag_field = structs[0].tag_field
    known = {info.tag: (*_layout(info.cls), _refused(info.cls)) for info in structs}

    def walk(value: dict[str, Any]) -> Sequence[Stray]:
        layout = known.get(value.get(tag_field) if tag_field is not None else None)
        if layout is None:
            return ()  # An error that convert names.
        names, nested, refused = layout
        if nested:
            return (*_outside(value, names, refused), *_within(value, nested))
        return () if names.issuperset(value) else _outside(value, names, refused)

    return walk


def _refused(kind: type[Struct]) -> NotSupported:
    return getattr(kind, "not_supported", {})
