"""Grammars under which a model can only write calls of the tools it was given, in its own family's form."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import attrs

from trio_llm import grammar
from trio_llm.grammar import GrammarSource
from trio_llm.server.markers import Markers
from trio_llm.server.parsing.tools import ToolForm

Mode = Literal["auto", "required", "beside"]

# Spelled as json.dumps does, which is what models were trained on.
_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_TEXT = r"/(.|\n)*/"


@attrs.frozen
class Tool:
    """A function a model may call; `parameters` is the JSON schema of its arguments."""

    name: str
    parameters: Mapping[str, Any]


def tool_grammar(
    form: ToolForm,
    tools: Sequence[Tool],
    *,
    mode: Mode,
    parallel: bool,
    special_tokens: Mapping[str, int],
) -> GrammarSource:
    """Return the grammar of an answer that calls `tools`.

    Args:
        mode: "required": nothing but calls, at least one; "auto": text, in which every call is well formed;
            "beside": calls as required, in a grammar that goes together with one of a JSON value.
        parallel: More than one call is allowed.
        special_tokens: Literal -> id; markers that are control tokens must be written as such.
    """
    markers = Markers(special_tokens)
    rules = {
        "hermes": _hermes,
        "llama3": _llama3,
        "mistral": _mistral_named if "[ARGS]" in special_tokens else _mistral_list,
    }[form](tools, markers, mode, parallel)
    grammar.check_multiples([tool.parameters for tool in tools], "tools")
    arguments = [f"args_{index}: %json {json.dumps(_schema(tool))}" for index, tool in enumerate(tools)]
    return grammar.lark(["%llguidance {}", *rules, f"TEXT: {_TEXT}", *arguments], param="tools")


def _schema(tool: Tool) -> dict[str, Any]:
    # A call's arguments are an object, whatever else the schema leaves open.
    return {"type": "object", **tool.parameters, "x-guidance": _JSON_STYLE}


def _whole_objects(tools: Sequence[Tool], key: str) -> list[str]:
    """Return the rules of `_objects` as JSON schemas.

    The parser takes the first of several grammars that begin with a brace, unless all of them are JSON of one style.
    """
    rules = ["object: " + " | ".join(f"object_{index}" for index in range(len(tools)))]
    for index, tool in enumerate(tools):
        arguments = {"type": "object", **tool.parameters}
        schema = {
            "type": "object",
            "properties": {"name": {"const": tool.name}, key: arguments},
            "required": ["name", key],
            "additionalProperties": False,
            # What the arguments refer to is looked up in the outermost schema.
            **{name: arguments.pop(name) for name in ("$defs", "definitions") if name in arguments},
            "x-guidance": {"whitespace_flexible": True},
        }
        rules.append(f"object_{index}: %json {json.dumps(schema)}")
    return rules


def _objects(tools: Sequence[Tool], key: str) -> list[str]:
    """Return the rule `object`: {"name": ..., key: {...}} for any of the tools."""
    options = " | ".join(f"object_{index}" for index in range(len(tools)))
    rules = [f"object: {options}"]
    for index, tool in enumerate(tools):
        start = json.dumps(f'{{"name": {json.dumps(tool.name)}, "{key}": ')
        rules.append(f'object_{index}: {start} args_{index} "}}"')
    return rules


def _hermes(tools: Sequence[Tool], markers: Markers, mode: str, parallel: bool) -> list[str]:
    close = f'"\\n" {markers("</tool_call>")}'
    rules = _objects(tools, "arguments")
    if mode == "auto":
        calls = "call*" if parallel else "call?"
        return [
            f"start: {calls} TEXT",
            *markers.after("TEXT", "<tool_call>"),
            f'call: opening "\\n" object {close}',
            *rules,
        ]
    more = '("\\n" call)*' if parallel else ""
    return [f"start: call {more}", f'call: {markers("<tool_call>")} "\\n" object {close}', *rules]


def _llama3(tools: Sequence[Tool], markers: Markers, mode: str, parallel: bool) -> list[str]:
    calls = 'object ("; " object)*' if parallel else "object"
    rules = _whole_objects(tools, "parameters") if mode == "beside" else _objects(tools, "parameters")
    if mode == "auto":
        # A bare call begins the message or there is none: text that begins with a brace is not to be told from one.
        return [
            f"start: {calls} | opening {calls} | PLAIN",
            *markers.after("PLAIN", "<|python_tag|>"),
            r"PLAIN: /([ \t\r\n]*[^{ \t\r\n](.|\n)*)?/",
            *rules,
        ]
    return [f"start: {calls}", *rules]


def _mistral_list(tools: Sequence[Tool], markers: Markers, mode: str, parallel: bool) -> list[str]:
    more = '(", " object)*' if parallel else ""
    rules = [f'list: " "? "[" object {more} "]"', *_objects(tools, "arguments")]
    if mode == "auto":
        return ["start: opening list | TEXT", *markers.after("TEXT", "[TOOL_CALLS]"), *rules]
    return [f"start: {markers('[TOOL_CALLS]')} list", *rules]


def _mistral_named(tools: Sequence[Tool], markers: Markers, mode: str, parallel: bool) -> list[str]:
    options = " | ".join(
        f"{json.dumps(tool.name)} {markers('[ARGS]')} args_{index}" for index, tool in enumerate(tools)
    )
    more = f"({markers('[TOOL_CALLS]')} named)*" if parallel else ""
    rules = [f"named: {options}"]
    if mode == "auto":
        return [f"start: opening named {more} | TEXT", *markers.after("TEXT", "[TOOL_CALLS]"), *rules]
    return [f"start: {markers('[TOOL_CALLS]')} named {more}", *rules]
