"""The values of a response template's fields: content in its declared form, then in its declared shape."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, cast

import regex

from trio_llm.server.parsing.readable_json import valid_text

TIMEOUT_S = 0.05
"""Of one search with a template's regular expression: answers are parsed on the event loop."""

Parse = Callable[[str], Any]
_ARGUMENTS = {
    "text": {"strip"},
    "json": {"unquoted_keys", "string_delims", "allow_non_json"},
    "xml-inline": {"tag_pattern", "value_parser", "merge_duplicates"},
    "kv-lines": {"line_sep", "kv_sep", "strip", "value_parser"},
}
_PLACEHOLDER = regex.compile(r"\{(\w+(?:\.\w+)*)\}")
_TRUE, _FALSE = ("true", "1"), ("false", "0")
_MAX_PATTERN_CHARS = 512


def content_parser(form: str, args: Mapping[str, Any]) -> Parse:
    """Return a parser of one form of content, which raises ValueError for text that is not of it.

    Raises:
        ValueError: An argument is unknown or wrong.
    """
    if unknown := set(args) - _ARGUMENTS.get(form, set()):
        raise ValueError(f"content_args.{min(unknown)} is unknown for {form!r}")
    match form:
        case "text":
            return str if args.get("strip") is False else str.strip
        case "int":
            return lambda text: int(text.strip())
        case "float":
            return lambda text: float(text.strip())
        case "bool":
            return lambda text: text.strip().lower() in _TRUE
        case "json":
            return _json_parser(args)
        case "xml-inline":
            return _tags_parser(args)
        case "kv-lines":
            return _lines_parser(args)
        case _:
            raise ValueError(f"content {form!r} is unknown")


def _json_parser(args: Mapping[str, Any]) -> Parse:
    """Parse JSON, and what models write for it: keys without quotes, strings in other quotes."""
    delimiters = args.get("string_delims", [])
    try:
        pairs: dict[str, str] = dict(delimiters)
        quoted = [f"{regex.escape(opening)}(.*?){regex.escape(closing)}" for opening, closing in pairs.items()]
    except (TypeError, ValueError):
        raise ValueError("content_args.string_delims must be pairs of texts") from None
    keys = [r"(?<=[{,])\s*+(?P<key>\w++)(?=\s*+:)"] if args.get("unquoted_keys") else []
    pattern = regex.compile("|".join([*quoted, r'"(?:\\.|[^"\\])*+"', *keys]), regex.DOTALL)

    def spelled(match: regex.Match[str]) -> str:
        inside = match.groups()
        text = next((group for group in inside if group is not None), None)
        return match[0] if text is None else json.dumps(text)

    def parse(text: str) -> Any:
        try:
            return json.loads(pattern.sub(spelled, text, timeout=TIMEOUT_S), parse_constant=_refuse, strict=False)
        except ValueError:
            if args.get("allow_non_json"):
                return text.strip()
            raise

    return parse


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _tags_parser(args: Mapping[str, Any]) -> Parse:
    """Parse a sequence of tags, each a key and its value."""
    spelled = args.get("tag_pattern")
    if not isinstance(spelled, str) or len(spelled) > _MAX_PATTERN_CHARS or regex.search(r"[0-9]{3}", spelled):
        raise ValueError("content_args.tag_pattern must be a short regular expression")
    try:
        pattern = regex.compile(spelled, regex.DOTALL)
    except (regex.error, RecursionError) as error:
        raise ValueError(f"content_args.tag_pattern: {error}") from None
    if not {"key", "value"} <= set(pattern.groupindex):
        raise ValueError("content_args.tag_pattern needs the groups 'key' and 'value'")
    parse_value, merges = _value_parser(args), args.get("merge_duplicates") is True

    def parse(text: str) -> dict[str, Any]:
        values: dict[str, list[Any]] = {}
        for match in pattern.finditer(text, timeout=TIMEOUT_S):
            values.setdefault(match["key"] or "", []).append(parse_value(match["value"] or ""))
        return {key: found if merges and len(found) > 1 else found[-1] for key, found in values.items()}

    return parse


def _lines_parser(args: Mapping[str, Any]) -> Parse:
    """Parse a pair of key and value per line; other lines are skipped."""
    line_sep, kv_sep = args.get("line_sep", "\n"), args.get("kv_sep", ":")
    if not (isinstance(line_sep, str) and isinstance(kv_sep, str) and line_sep and kv_sep):
        raise ValueError("content_args.line_sep and kv_sep must be texts")
    parse_value, clean = _value_parser(args), str if args.get("strip") is False else str.strip

    def parse(text: str) -> dict[str, Any]:
        pairs = (line.partition(kv_sep) for line in map(clean, text.split(line_sep)))
        return {clean(key): parse_value(clean(value)) for key, found, value in pairs if found}

    return parse


def _value_parser(args: Mapping[str, Any]) -> Parse:
    inner = args.get("value_parser")
    if inner is None:
        return str
    if not isinstance(inner, dict) or not set(cast("dict[str, Any]", inner)) <= {"name", "args"}:
        raise ValueError("content_args.value_parser must have a name and args")
    given = cast("dict[str, Any]", inner)
    return content_parser(given.get("name", "text"), given.get("args", {}))


def check_shape(transform: Any) -> None:
    """Check a transform: a placeholder must be a whole text. Raises ValueError."""
    for text in _texts(transform):
        if _PLACEHOLDER.search(text) and not _PLACEHOLDER.fullmatch(text):
            raise ValueError(f"transform mixes a placeholder with text: {text[:60]!r}")


def _texts(transform: Any) -> Iterator[str]:
    if isinstance(transform, str):
        yield transform
    inner = cast("dict[str, Any]", transform).values() if isinstance(transform, dict) else _list(transform)
    for value in inner:
        yield from _texts(value)


def shaped(value: Any, transform: Any, captures: Mapping[str, str], *, each: bool) -> Any:
    """Return a value in its declared shape. Raises ValueError if it lacks what the shape names."""
    if transform is None:
        return value
    if not each:
        return _filled(transform, {**captures, "content": value})
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in cast("list[Any]", value)):
        raise ValueError("transform_each needs a list of objects")
    return [_filled(transform, {**captures, **item}) for item in cast("list[dict[str, Any]]", value)]


def _filled(transform: Any, scope: Mapping[str, Any]) -> Any:
    match transform:
        case dict():
            return {key: _filled(value, scope) for key, value in cast("dict[str, Any]", transform).items()}
        case list():
            return [_filled(value, scope) for value in cast("list[Any]", transform)]
        case str() if (found := _PLACEHOLDER.fullmatch(transform)) is not None:
            value: Any = scope
            for key in found[1].split("."):
                if not isinstance(value, Mapping) or key not in value:
                    raise ValueError(f"{transform} is missing")
                value = cast("Mapping[str, Any]", value)[key]
            return value
        case _:
            return transform


def calls_of(value: Any, schemas: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the calls that a value is: names, and arguments as JSON.

    Args:
        schemas: Function -> JSON schema of its arguments. Texts become what the schema says, where they spell it.

    Raises:
        ValueError: The value is something else.
    """
    if isinstance(value, list):
        return [call for item in cast("list[Any]", value) for call in calls_of(item, schemas)]
    outer: Mapping[str, Any] = cast("Mapping[str, Any]", value) if isinstance(value, dict) else {}
    inner = outer.get("function", outer)
    function: Mapping[str, Any] = cast("Mapping[str, Any]", inner) if isinstance(inner, dict) else {}
    name, arguments = function.get("name"), function.get("arguments", {})
    if not isinstance(name, str) or not name:
        raise ValueError("a call has no name")
    name = valid_text(name)
    if isinstance(arguments, dict):
        return [(name, json_text(_cast_all(cast("dict[str, Any]", arguments), schemas.get(name))))]
    return [(name, valid_text(arguments) if isinstance(arguments, str) else json_text(arguments))]


def json_text(value: Any) -> str:
    """Return a value as JSON that can be written as UTF-8."""
    text = json.dumps(value, ensure_ascii=False)
    return text if text.isascii() or text.encode(errors="replace").decode() == text else json.dumps(value)


def _cast_all(arguments: dict[str, Any], schema: Any) -> dict[str, Any]:
    properties: Any = cast("dict[str, Any]", schema).get("properties") if isinstance(schema, dict) else None
    if not isinstance(properties, dict):
        return arguments
    known = {name: _types(one) for name, one in cast("dict[str, Any]", properties).items()}

    def convert(name: str, value: Any) -> Any:
        types = known.get(name, ())
        if isinstance(value, str):
            return _cast(value, types)
        if "array" in types or not _list(value):
            return value
        # The values of a key that came more than once.
        return [_cast(item, types) if isinstance(item, str) else item for item in _list(value)]

    return {name: convert(name, value) for name, value in arguments.items()}


def _types(schema: Any) -> Sequence[str]:
    if not isinstance(schema, dict):
        return ()
    keywords = cast("dict[str, Any]", schema)
    declared = keywords.get("type")
    types = _list(declared) or [declared]
    for union in ("anyOf", "oneOf"):
        types += [one for option in _list(keywords.get(union)) for one in _types(option)]
    return [one for one in types if isinstance(one, str)] + (["null"] if keywords.get("nullable") is True else [])


def _list(value: Any) -> list[Any]:
    return list(cast("list[Any]", value)) if isinstance(value, list) else []


def _cast(text: str, types: Sequence[str]) -> Any:
    """Return a text as the first of these types that it spells; else the text."""
    for kind in types:
        try:
            return _CASTS[kind](text)
        except (KeyError, ValueError, OverflowError, RecursionError):
            continue
    return text


def _number(text: str) -> int | float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError
    return int(number) if number.is_integer() and "." not in text else number


def _integer(text: str) -> int:
    number = float(text)
    if not number.is_integer():
        raise ValueError
    try:
        return int(text)
    except ValueError:
        return int(number)


def _word(text: str, words: Mapping[str, Any]) -> Any:
    return words[text.strip()]


def _decoded(text: str, kind: type) -> Any:
    value = json.loads(text, parse_constant=_refuse)
    if not isinstance(value, kind):
        raise ValueError
    return value


_CASTS: dict[str, Callable[[str], Any]] = {
    "string": str,
    "integer": _integer,
    "number": _number,
    "boolean": lambda text: _word(text.lower(), {**dict.fromkeys(_TRUE, True), **dict.fromkeys(_FALSE, False)}),
    "null": lambda text: _word(text, {"null": None, "None": None}),
    "object": lambda text: _decoded(text, dict),
    "array": lambda text: _decoded(text, list),
}
