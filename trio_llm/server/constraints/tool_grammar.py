"""Grammars that allow only calls of the given tools, in the form of the model's family."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from trio_llm import grammar
from trio_llm.grammar import GrammarSource
from trio_llm.server.constraints.gemma_grammar import Tool, gemma_rules
from trio_llm.server.constraints.markers import FURTHER_CALLS, Markers
from trio_llm.server.parsing.tools import ToolForm

Mode = Literal["auto", "required", "alongside"]

_TEXT = r"/(.|\n)*/"


def tool_grammar(
    form: ToolForm,
    tools: Sequence[Tool],
    *,
    mode: Mode,
    parallel: bool,
    added_tokens: Mapping[str, int],
) -> GrammarSource:
    """Return the grammar of an answer that calls `tools`.

    Args:
        mode: "required": only calls, at least one; "auto": text in which every call is well formed; "alongside": like
            "required", in a grammar that can be combined with that of a JSON value.
        parallel: More than one call is allowed, at most MAX_CALLS in an answer that must be calls.
        added_tokens: Literal -> id; markers that are tokens must be written as such.
    """
    markers = Markers(added_tokens)
    if form == "gemma4":
        return grammar.lark(gemma_rules(tools, markers, mode, parallel), param="tools")
    rules = {
        "hermes": _hermes,
        "llama3": _llama3,
        "mistral": _mistral_named if "[ARGS]" in added_tokens else _mistral_list,
    }[form](tools, markers, mode, parallel)
    grammar.check_multiples([tool.parameters for tool in tools], "tools")
    schemas = [_schema(tool) for tool in tools]
    arguments = [f"args_{index}: %json {json.dumps(schema)}" for index, schema in enumerate(schemas)]
    forms = [
        grammar.json_part(schema, param="tools", part=f"the parameters of {tool.name!r}")
        for tool, schema in zip(tools, schemas, strict=True)
    ]
    return grammar.lark(["%llguidance {}", *rules, f"TEXT: {_TEXT}", *arguments], param="tools", forms=forms)


def _schema(tool: Tool) -> dict[str, Any]:
    # A call's arguments are always an object.
    return {"type": "object", **tool.parameters, grammar.OPTIONS: grammar.json_options(any_whitespace=False)}


def _whole_objects(tools: Sequence[Tool], key: str) -> list[str]:
    """Return the rules of `_objects` as JSON schemas.

    Of several grammars that begin with a brace, the parser tries only the first, unless all are JSON of one style.
    """
    rules = ["object: " + " | ".join(f"object_{index}" for index in range(len(tools)))]
    for index, tool in enumerate(tools):
        arguments = {"type": "object", **tool.parameters}
        schema = {
            "type": "object",
            "properties": {"name": {"const": tool.name}, key: arguments},
            "required": ["name", key],
            "additionalProperties": False,
            # References in the arguments are resolved in the outermost schema.
            **{name: arguments.pop(name) for name in ("$defs", "definitions") if name in arguments},
            grammar.OPTIONS: grammar.json_options(any_whitespace=True),
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
        # Unbounded: the text behind a last call could hold further calls, which nothing would hold to a schema.
        calls = "call*" if parallel else "call?"
        return [
            f"start: {calls} TEXT",
            *markers.after("TEXT", "<tool_call>"),
            f'call: opening "\\n" object {close}',
            *rules,
        ]
    more = f'("\\n" call){FURTHER_CALLS}' if parallel else ""
    return [f"start: call {more}", f'call: {markers("<tool_call>")} "\\n" object {close}', *rules]


def _llama3(tools: Sequence[Tool], markers: Markers, mode: str, parallel: bool) -> list[str]:
    calls = f'object ("; " object){FURTHER_CALLS}' if parallel else "object"
    rules = _whole_objects(tools, "parameters") if mode == "alongside" else _objects(tools, "parameters")
    if mode == "auto":
        # A bare call can only begin the message: text that begins like a call or a list of calls is indistinguishable
        # from one.
        return [
            f"start: {calls} | opening {calls} | PLAIN",
            *markers.after("PLAIN", "<|python_tag|>"),
            r"PLAIN: /([ \t\r\n]*([^{\[ \t\r\n](.|\n)*|\[[ \t\r\n]*([^{ \t\r\n](.|\n)*)?))?/",
            *rules,
        ]
    return [f"start: {calls}", *rules]


def _mistral_list(tools: Sequence[Tool], markers: Markers, mode: str, parallel: bool) -> list[str]:
    more = f'(", " object){FURTHER_CALLS}' if parallel else ""
    rules = [f'list: " "? "[" object {more} "]"', *_objects(tools, "arguments")]
    if mode == "auto":
        return ["start: opening list | TEXT", *markers.after("TEXT", "[TOOL_CALLS]"), *rules]
    return [f"start: {markers('[TOOL_CALLS]')} list", *rules]


def _mistral_named(tools: Sequence[Tool], markers: Markers, mode: str, parallel: bool) -> list[str]:
    options = " | ".join(
        f"{json.dumps(tool.name)} {markers('[ARGS]')} args_{index}" for index, tool in enumerate(tools)
    )
    more = f"({markers('[TOOL_CALLS]')} named){FURTHER_CALLS}" if parallel else ""
    rules = [f"named: {options}"]
    if mode == "auto":
        return [f"start: opening named {more} | TEXT", *markers.after("TEXT", "[TOOL_CALLS]"), *rules]
    return [f"start: {markers('[TOOL_CALLS]')} named {more}", *rules]
