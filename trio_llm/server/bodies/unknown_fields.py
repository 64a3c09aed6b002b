"""Find fields without effect in a JSON body, at any depth, so that none is ignored silently.

A field that would change the meaning of the answer is refused by name (`not_supported` of its type). A field that only
hints at how to produce the answer is accepted and named in a Warning (`hints` of its type). A field that is in no type
is accepted and named too, or refused in strict mode. A part of a message that is no text (`text_types` of its type) is
refused whole: its fields are not the fault.

msgspec checks the known fields and skips the rest. This module walks the value along the same types, and only into
objects: a body without such fields costs one comparison of key sets per object.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, Literal, TypeAlias, cast

import attrs
from msgspec import Struct, inspect

from trio_llm.errors import InvalidRequestError

MAX_UNKNOWN = 100
"""Maximum of reported fields without effect per object; a body can have hundreds of thousands."""

Neutral: TypeAlias = Mapping[str, tuple[Any, ...]]
"""Field -> its neutral values, which need no warning."""

_INSTEAD = {
    "guided_json": "structured_outputs",
    "guided_regex": "structured_outputs",
    "guided_choice": "structured_outputs",
    "guided_grammar": "structured_outputs",
    "functions": "tools",
    "function_call": "tool_choice",
}
# What other APIs call a field, where its spelling does not tell.
_ELSEWHERE = {
    "max_new_tokens": "max_tokens",
    "max_output_tokens": "max_tokens",
    "n_predict": "max_tokens",
    "num_predict": "max_tokens",
    "stop_sequences": "stop",
    "enable_thinking": "chat_template_kwargs",
}
_MAX_CORRECTED_CHARS = 40


@attrs.frozen
class ExtraField:
    """A field without effect.

    Attributes:
        path: For example `messages[0].name`.
        kind: "unknown": no type has the field; "hint": accepted without effect; "refused": not supported, and it would
            change the answer; "part": refused, as it is no text; "tool": a tool that this server cannot run.
        known: Fields of the object that has an unknown one.
    """

    path: str
    kind: Literal["unknown", "hint", "refused", "part", "tool"]
    known: frozenset[str] = frozenset()

    def below(self, where: str) -> ExtraField:
        """Return it with the path of an enclosing field or index in front."""
        joint = "" if self.path[:1] in ("", "[") else "."
        return attrs.evolve(self, path=f"{where}{joint}{self.path}")

    @property
    def meant(self) -> str | None:
        """The known field that was probably meant. Takes up to a millisecond."""
        name = self.path.rpartition(".")[2]
        if len(name) > _MAX_CORRECTED_CHARS or not self.known:
            return None
        if (other := _ELSEWHERE.get(name)) in self.known:
            return other
        spelled = {_plain(known): known for known in sorted(self.known)}
        close = difflib.get_close_matches(_plain(name), spelled, n=1, cutoff=0.8)
        return spelled[close[0]] if close else None


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


_Walk: TypeAlias = Callable[[Any], Sequence[ExtraField]]


def check_fields(
    value: Mapping[str, Any], kind: type[Struct], refused: Neutral, hints: Neutral, *, strict: bool
) -> tuple[ExtraField, ...]:
    """Return the hints and unknown fields in `value`.

    Raises:
        InvalidRequestError: A field that would change the answer and is not supported; a part that is no text; in
            strict mode, an unknown field.
    """
    extras = extra_fields(value, kind, refused, hints)
    for extra in extras:
        if extra.kind == "refused":
            instead = _INSTEAD.get(extra.path)
            hint = f"; use '{instead}'" if instead in _layout(kind)[0] else ""
            raise InvalidRequestError(f"'{extra.path}' is not supported by this server{hint}.", param=extra.path)
        if extra.kind == "part":
            raise InvalidRequestError(f"'{extra.path}': only parts of text are supported.", param=extra.path)
    for extra in extras:
        if strict and extra.kind == "unknown":
            raise unknown_field(extra)
    return tuple(extras)


def unknown_field(extra: ExtraField) -> InvalidRequestError:
    """Return the error for an unknown field in strict mode."""
    path, meant = extra.path[:64], f" (did you mean '{extra.meant}'?)" if extra.meant else ""
    return InvalidRequestError(f"Unknown field '{path}'{meant}: unknown fields are refused (--strict).", param=path)


def extra_fields(
    value: Mapping[str, Any], kind: type[Struct], refused: Neutral, hints: Neutral | None = None
) -> Sequence[ExtraField]:
    """Return the fields in `value` that `kind` does not have, in order; null is the same as absent.

    Args:
        refused, hints: Of the outermost object; nested types list theirs in `not_supported` and `hints`.
    """
    names, nested = _layout(kind)
    return (*_outside(value, names, refused, hints or {}), *_within(value, nested))


@cache
def _layout(kind: type[Struct]) -> tuple[frozenset[str], tuple[tuple[str, _Walk], ...]]:
    """Return the names of a type's fields, and the walkers of fields that contain objects."""
    info = cast(inspect.StructType, inspect.type_info(kind))
    tag = (info.tag_field,) if info.tag_field is not None else ()
    nested = tuple((field.encode_name, walk) for field in info.fields if (walk := _walk(field.type)) is not None)
    return frozenset((*(field.encode_name for field in info.fields), *tag)), nested


def _outside(value: Mapping[str, Any], names: frozenset[str], refused: Neutral, hints: Neutral) -> Sequence[ExtraField]:
    if names.issuperset(value):
        return ()
    extras: list[ExtraField] = []
    for name, item in value.items():
        if name in names or item is None or item in refused.get(name, hints.get(name, ())):
            continue
        if name in refused:
            extras.append(ExtraField(name, "refused"))
        elif len(extras) < MAX_UNKNOWN:
            extras.append(ExtraField(name, "hint") if name in hints else ExtraField(name, "unknown", names))
    return extras


def _within(value: Mapping[str, Any], nested: Iterable[tuple[str, _Walk]]) -> Sequence[ExtraField]:
    found: list[ExtraField] = []
    for name, walk in nested:
        if name in value and (inner := walk(value[name])):
            found += [extra.below(name) for extra in inner]
    return found


def _walk(info: inspect.Type) -> _Walk | None:
    """Return the walker of a type's values; None if they cannot have unknown fields."""
    options = info.types if isinstance(info, inspect.UnionType) else (info,)
    structs = [option for option in options if isinstance(option, inspect.StructType)]
    lists = [option.item_type for option in options if isinstance(option, inspect.ListType)]
    objects = _objects_walk(structs) if structs else None
    items = next((found for item in lists if (found := _walk(item)) is not None), None)
    if objects is None and items is None:
        return None

    def walk(value: Any) -> Sequence[ExtraField]:
        if items is not None and isinstance(value, list):
            extras: list[ExtraField] = []
            for index, item in enumerate(cast("list[Any]", value)):
                if inner := items(item):
                    extras += [extra.below(f"[{index}]") for extra in inner]
            return extras
        return objects(value) if objects is not None and isinstance(value, dict) else ()

    return walk


def _objects_walk(structs: Sequence[inspect.StructType]) -> _Walk:
    """Return the walker of an object of one of several types, distinguished by their tags."""
    tag_field = structs[0].tag_field
    layouts = {info.tag: (*_layout(info.cls), not_supported(info.cls), hints(info.cls)) for info in structs}
    text_types: Container[str] | None = getattr(structs[0].cls, "text_types", None)

    def walk(value: dict[str, Any]) -> Sequence[ExtraField]:
        if text_types is not None and isinstance(kind := value.get("type"), str) and kind not in text_types:
            return (ExtraField("", "part"),)
        tag = value.get(tag_field) if tag_field is not None else None
        layout = layouts.get(tag) if tag is None or isinstance(tag, str) else None
        if layout is None:
            return ()  # An error that convert names.
        names, nested, refused, ignored = layout
        if nested:
            return (*_outside(value, names, refused, ignored), *_within(value, nested))
        return () if names.issuperset(value) else _outside(value, names, refused, ignored)

    return walk


def not_supported(kind: type[Struct]) -> Neutral:
    """Return the fields that a type refuses by name."""
    return getattr(kind, "not_supported", {})


def hints(kind: type[Struct]) -> Neutral:
    """Return the fields that a type accepts without effect."""
    return getattr(kind, "hints", {})
