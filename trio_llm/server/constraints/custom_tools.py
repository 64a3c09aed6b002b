"""Custom tools, as the functions that they are to a model, and the grammars of their texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from trio_llm.server.bodies.tools import Function, ToolDefinition
from trio_llm.server.services import Services


def as_functions(services: Services, tools: Sequence[ToolDefinition]) -> list[Function]:
    """Return the functions that the model is offered."""
    binds = _binds(services)
    return [_as_function(tool, binds=binds) for tool in tools]


def offered(functions: Sequence[Function]) -> list[dict[str, Any]]:
    """Return the definitions of functions for a template."""
    return [{"type": "function", "function": msgspec.to_builtins(function)} for function in functions]


def unheld_tools(services: Services, tools: Sequence[ToolDefinition]) -> list[str]:
    """Return the names of the tools whose grammar the model only reads."""
    binds = _binds(services)
    grammars = [(tool.name, tool.custom.grammar) for tool in tools if tool.custom is not None]
    return [name for name, form in grammars if form is not None and (form.syntax == "lark" or not binds)]


def _binds(services: Services) -> bool:
    """Return whether calls can be held to a regular expression: their form is known, and its strings are JSON."""
    return services.tool_form not in (None, "gemma4")


def _as_function(tool: ToolDefinition, *, binds: bool) -> Function:
    if (custom := tool.custom) is None:
        assert tool.function is not None
        return tool.function
    text: dict[str, Any] = {"type": "string"}
    described, strict = custom.description, None
    if (form := custom.grammar) is not None:
        described = f"{described or ''}\nThe input follows this {form.syntax} grammar:\n{form.definition}".strip()
        # No grammar of JSON's strings can be made of a Lark grammar, whose rules are those of the plain text.
        if form.syntax == "regex" and binds:
            text["pattern"], strict = f"^(?:{form.definition})$", True
    parameters = {
        "type": "object", "properties": {"input": text}, "required": ["input"], "additionalProperties": False
    }  # fmt: skip
    return Function(name=custom.name, description=described, parameters=parameters, strict=strict)
