"""The tools of POST /v1/responses: functions, custom tools that take a text, and namespaces of both.

A model is offered functions only. A custom tool is one with the argument `input`, and a function of a namespace has the
namespace before its name; calls are told apart again when they are answered.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import attrs
from msgspec import Struct

from trio_llm.server.bodies import tools
from trio_llm.server.bodies.tools import Function, Grammar, TextInput, ToolDefinition, ToolName
from trio_llm.server.bodies.unknown_fields import Neutral

_SEPARATOR = "__"


class FunctionTool(Struct, kw_only=True, tag_field="type", tag="function"):
    """A function that the model may call.

    Attributes:
        name: Name of the function.
        description: What it does, for the model.
        parameters: JSON schema of its arguments.
        strict: Hold the arguments to the schema.
    """

    hints: ClassVar[Neutral] = {"defer_loading": (False,), "output_schema": ()}
    not_supported: ClassVar[Neutral] = {"allowed_callers": (["direct"],), "async": (False,)}

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class GrammarInput(Struct, kw_only=True, tag_field="type", tag="grammar"):
    """Input that follows a grammar, which the model is shown.

    Attributes:
        syntax: Of the definition. A regular expression binds the input; a Lark grammar does not, a Warning says.
        definition: The grammar.
    """

    syntax: Literal["lark", "regex"]
    definition: str


class CustomTool(Struct, kw_only=True, tag_field="type", tag="custom"):
    """A tool that the model may call with a text.

    Attributes:
        name: Name of the tool.
        description: What it does, for the model.
        format: What its input is like; any text by default.
    """

    hints: ClassVar[Neutral] = {"defer_loading": (False,)}
    not_supported: ClassVar[Neutral] = {"allowed_callers": (["direct"],), "async": (False,)}

    name: ToolName
    description: str | None = None
    format: TextInput | GrammarInput | None = None


class NamespaceTool(Struct, kw_only=True, tag_field="type", tag="namespace"):
    """Tools with a common name before their own.

    Attributes:
        name: The common name; calls come back with it as `namespace`.
        description: What they are for; every one of them shows it to the model.
        tools: The tools.
    """

    name: ToolName
    description: str | None = None
    tools: list[FunctionTool | CustomTool]


Tool = FunctionTool | CustomTool | NamespaceTool


@attrs.frozen
class OfferedTool:
    """A tool as the model knows it.

    Attributes:
        name: What the model calls.
        tool: What the client offered.
        namespace: The tool's namespace, None without one.
        about: What its namespace is for.
    """

    name: str
    tool: FunctionTool | CustomTool
    namespace: str | None
    about: str = ""

    @property
    def is_custom(self) -> bool:
        return isinstance(self.tool, CustomTool)

    def definition(self) -> ToolDefinition:
        """Return the tool of a chat that the model is offered."""
        tool = self.tool
        described = "\n".join(filter(None, (self.about, tool.description))) or None
        if isinstance(tool, FunctionTool):
            function = Function(name=self.name, description=described, parameters=tool.parameters, strict=tool.strict)
            return ToolDefinition(function=function)
        form = tool.format
        if isinstance(form, GrammarInput):
            form = tools.GrammarFormat(grammar=Grammar(syntax=form.syntax, definition=form.definition))
        return ToolDefinition(type="custom", custom=tools.Custom(name=self.name, description=described, format=form))


def offered_tools(given: Sequence[Tool]) -> Iterator[OfferedTool]:
    """Yield the tools of a request, those of namespaces one by one."""
    for tool in given:
        if not isinstance(tool, NamespaceTool):
            yield OfferedTool(tool.name, tool, None)
            continue
        for inner in tool.tools:
            yield OfferedTool(full_name(inner.name, tool.name), inner, tool.name, tool.description or "")


def full_name(name: str, namespace: str | None) -> str:
    """Return the name by which the model knows a tool."""
    return name if namespace is None else f"{namespace}{_SEPARATOR}{name}"
