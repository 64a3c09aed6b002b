"""Grammars of Gemma 4's tool calls, whose arguments are not JSON: rules made from the JSON schemas of the tools."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard, cast

import attrs

from trio_llm.errors import InvalidRequestError
from trio_llm.server.constraints.markers import FURTHER_CALLS, Markers
from trio_llm.server.parsing.gemma_calls import CLOSE, OPEN, QUOTE

# Any value, if the schema does not constrain it.
_VALUE = [
    'value: text | NUMBER | "true" | "false" | "null" | list | object',
    'list: "[" (value ("," value)*)? "]"',
    'object: "{" (pair ("," pair)*)? "}"',
    'pair: KEY ":" value',
    r"KEY: /[A-Za-z_][A-Za-z0-9_.-]*/",
    r"NUMBER: /-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?/",
    r"INTEGER: /-?(0|[1-9][0-9]*)/",
]
_SIMPLE = {
    "string": "text",
    "number": "NUMBER",
    "integer": "INTEGER",
    "boolean": '("true" | "false")',
    "null": '"null"',
}
# Keywords that the rules below enforce, or that do not constrain the form.
_ENFORCED = frozenset(
    "items description title default examples additionalProperties nullable "
    "$schema $id $comment format deprecated readOnly writeOnly strict".split()
)


@attrs.frozen
class Tool:
    """A function a model may call; `parameters` is the JSON schema of its arguments."""

    name: str
    parameters: Mapping[str, Any]
    strict: bool = False


def gemma_rules(tools: Sequence[Tool], markers: Markers, mode: str, parallel: bool) -> list[str]:
    """Return the rules of an answer that calls tools; see `tool_grammar` for the modes.

    Raises:
        InvalidRequestError: These rules cannot enforce the schema of a strict tool.
    """
    quote = markers(QUOTE)
    rules = _Rules(quote)
    calls: list[str] = []
    for tool in tools:
        if tool.strict and (keyword := _not_enforced(tool.parameters)) is not None:
            raise InvalidRequestError(
                f"tools: strict cannot hold {tool.name!r} to {keyword!r} in this model's form of calls.", param="tools"
            )
        arguments = rules.of({"type": "object", **tool.parameters})
        calls.append(f"{json.dumps(f'call:{tool.name}')} {arguments}")
    text = r"TEXT: /(.|\n)*/" if markers.is_token(QUOTE) else r"TEXT: /[^<]*/"
    ending = f"call: ({' | '.join(calls)}) {markers(CLOSE)}"
    more = f"({markers(OPEN)} call){FURTHER_CALLS}" if parallel else ""
    if mode == "auto":
        start = [f"start: opening call {more} | PLAIN", *markers.after("PLAIN", OPEN), r"PLAIN: /(.|\n)*/"]
    else:
        start = [f"start: {markers(OPEN)} call {more}"]
    return ["%llguidance {}", *start, ending, f"text: {quote} TEXT {quote}", text, *_VALUE, *rules.lines]


class _Rules:
    """Makes rules of schemas.

    Attributes:
        lines: The rules so far.
    """

    def __init__(self, quote: str) -> None:
        self.lines: list[str] = []
        self._quote = quote

    def of(self, schema: object) -> str:
        """Return an expression for a value of this schema."""
        if not isinstance(schema, dict):
            return "value"
        keywords = cast("dict[str, Any]", schema)
        options = [keywords["const"]] if "const" in keywords else keywords.get("enum")
        if _are_constants(options):
            return f"({' | '.join(map(self._constant, options))})"
        kinds = keywords.get("type")
        if _are_kinds(kinds):
            return f"({' | '.join(self.of({**keywords, 'type': kind}) for kind in dict.fromkeys(kinds))})"
        match kinds:
            case "object" if isinstance(keywords.get("properties"), dict) and keywords["properties"]:
                required = keywords.get("required")
                names = cast("list[object]", required) if isinstance(required, list) else ()
                return self._object(keywords["properties"], names)
            case "object":
                return "object"
            case "array" if "items" in keywords:
                item = self.of(keywords["items"])
                return f'"[" ({item} ("," {item})*)? "]"'
            case "array":
                return "list"
            case str(kind) if kind in _SIMPLE:
                return _SIMPLE[kind]
            case _:
                return "value"

    def _constant(self, value: object) -> str:
        if isinstance(value, str):
            return f"{self._quote} {json.dumps(value)} {self._quote}"
        return json.dumps(json.dumps(value))

    def _object(self, properties: Mapping[str, Any], required: Sequence[object]) -> str:
        """Make rules for properties in the order of their names, as the template writes them."""
        number = len(self.lines)
        self.lines.append("")  # Kept for this object, whose parts come first.
        names = sorted(properties)
        pairs = [f"{json.dumps(f'{name}:')} {self.of(properties[name])}" for name in names]
        # first_i: properties from the i-th on, none written yet; rest_i: the same behind another one.
        lines = [f'o{number}_first_{len(names)}: ""', f'o{number}_rest_{len(names)}: ""']
        for index, (name, pair) in enumerate(zip(names, pairs, strict=True)):
            after = f"o{number}_rest_{index + 1}"
            skip = name not in required
            first = f"{pair} {after}" + (f" | o{number}_first_{index + 1}" if skip else "")
            rest = f'"," {pair} {after}' + (f" | {after}" if skip else "")
            lines += [f"o{number}_first_{index}: {first}", f"o{number}_rest_{index}: {rest}"]
        self.lines[number] = f'o{number}: "{{" o{number}_first_0 "}}"'
        self.lines += lines
        return f"o{number}"


def _not_enforced(schema: object) -> str | None:
    """Return a keyword of a schema, at any depth, that the rules do not enforce."""
    if not isinstance(schema, dict):
        return None
    for keyword, value in cast("dict[str, Any]", schema).items():
        if not _is_enforced(keyword, value):
            return keyword
        parts: list[object] = [value] if keyword == "items" else []
        if keyword == "properties" and isinstance(value, dict):
            parts = list(cast("dict[str, object]", value).values())
        if (found := next(filter(None, map(_not_enforced, parts)), None)) is not None:
            return found
    return None


def _is_enforced(keyword: str, value: object) -> bool:
    match keyword:
        case "type":
            return _are_kinds(value) or _are_kinds([value])
        case "properties":
            return isinstance(value, dict)
        case "required":
            return isinstance(value, list)
        case "enum":
            return _are_constants(value)
        case "const":
            return _are_constants([value])
        case _:
            return keyword in _ENFORCED


def _are_kinds(kinds: object) -> TypeGuard[list[str]]:
    if not isinstance(kinds, list) or not kinds:
        return False
    known = {*_SIMPLE, "object", "array"}
    return all(isinstance(kind, str) and kind in known for kind in cast("list[object]", kinds))


def _are_constants(options: object) -> TypeGuard[list[object]]:
    if not isinstance(options, list) or not options:
        return False
    return all(isinstance(option, str | int | float | bool | None) for option in cast("list[object]", options))
