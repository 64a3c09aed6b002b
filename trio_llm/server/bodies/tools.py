"""The tools of a chat, the choice among them, and calls in earlier turns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

ToolName = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]
MAX_TOOLS = 512
RUNNABLE_TOOLS = frozenset({"function", "custom"})
"""The types of tools that a client of a chat runs."""


class TextInput(Struct, kw_only=True, tag_field="type", tag="text"):
    """Input of any text."""


class Grammar(Struct, kw_only=True):
    """A grammar of texts, which the model is shown.

    Attributes:
        syntax: Of the definition. A regular expression binds the input; a Lark grammar does not, a Warning says.
        definition: The grammar.
    """

    syntax: Literal["lark", "regex"]
    definition: str


class GrammarFormat(Struct, kw_only=True, tag_field="type", tag="grammar"):
    """Input that follows a grammar.

    Attributes:
        grammar: The grammar.
    """

    grammar: Grammar


class Custom(Struct, kw_only=True):
    """A tool that the model may call with a text.

    Attributes:
        name: Name of the tool.
        description: What it does, for the model.
        format: What its input is like; any text by default.
    """

    name: ToolName
    description: str | None = None
    format: TextInput | GrammarFormat | None = None

    @property
    def grammar(self) -> Grammar | None:
        """The grammar of its input, None without one."""
        return self.format.grammar if isinstance(self.format, GrammarFormat) else None


class Function(Struct, kw_only=True, omit_defaults=True):
    """A function the model may call; `parameters` is the JSON schema of its arguments.

    Attributes:
        name: Name of the function.
        description: What it does, for the model.
        parameters: JSON schema of its arguments.
        strict: Hold the arguments to the schema.
    """

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolDefinition(Struct, kw_only=True):
    """One of `tools`.

    Attributes:
        function: The function, for type "function".
        custom: The tool, for type "custom".
        type: Kind of the tool; other kinds than "function" and "custom" are dropped with a Warning.
    """

    function: Function | None = None
    custom: Custom | None = None
    type: Literal["function", "custom"] = "function"

    def __post_init__(self) -> None:
        _check_kind(self)

    @property
    def name(self) -> str:
        """The name of the function or custom tool."""
        tool = self.function or self.custom
        assert tool is not None
        return tool.name


class CalledFunction(Struct, kw_only=True):
    """What an earlier turn called; `arguments` is JSON text.

    Attributes:
        name: Name of the function.
        arguments: Text of a JSON object, or the object.
    """

    name: str
    arguments: str | dict[str, Any] = "{}"


class CalledCustom(Struct, kw_only=True):
    """The custom tool that an earlier turn called.

    Attributes:
        name: Name of the tool.
        input: The text that it was given.
    """

    name: str
    input: str


class ToolCall(Struct, kw_only=True):
    """A call in an earlier turn of the assistant.

    Attributes:
        function: Which function was called with which arguments, for type "function".
        custom: Which custom tool was called with which text, for type "custom".
        id: Id of the call, as in the answer that made it.
        type: Kind of the tool.
    """

    function: CalledFunction | None = None
    custom: CalledCustom | None = None
    id: str | None = None
    type: Literal["function", "custom"] = "function"

    def __post_init__(self) -> None:
        _check_kind(self)


class ToolReference(Struct, kw_only=True):
    """A tool of a tool_choice.

    Attributes:
        name: Name of the tool.
    """

    name: str


class AllowedTool(Struct, kw_only=True):
    """One of the tools that may be called.

    Attributes:
        function: The function, for type "function".
        custom: The custom tool, for type "custom".
        type: Kind of the tool.
    """

    function: ToolReference | None = None
    custom: ToolReference | None = None
    type: Literal["function", "custom"] = "function"

    def __post_init__(self) -> None:
        _check_kind(self)


class AllowedTools(Struct, kw_only=True):
    """The only tools that may be called.

    Attributes:
        mode: "auto": as the model likes; "required": one of them must be called.
        tools: The tools, by name.
    """

    mode: Literal["auto", "required"]
    tools: Annotated[list[AllowedTool], Meta(min_length=1, max_length=MAX_TOOLS)]


class NamedToolChoice(Struct, kw_only=True):
    """tool_choice by name: the tool that must be called, or the only ones that may be.

    Attributes:
        function: The function that must be called, for type "function".
        custom: The custom tool that must be called, for type "custom".
        allowed_tools: The tools that may be called, for type "allowed_tools"; the model is offered no others.
        type: Kind of the choice.
    """

    function: ToolReference | None = None
    custom: ToolReference | None = None
    allowed_tools: AllowedTools | None = None
    type: Literal["function", "custom", "allowed_tools"] = "function"

    def __post_init__(self) -> None:
        _check_kind(self)

    @property
    def names(self) -> Sequence[str]:
        """The names of the chosen tools."""
        chosen = self.allowed_tools.tools if self.allowed_tools is not None else (self,)
        return [named.name for tool in chosen if (named := tool.function or tool.custom) is not None]

    @property
    def must_call(self) -> bool:
        """Whether one of them must be called."""
        return self.allowed_tools is None or self.allowed_tools.mode == "required"


def _check_kind(given: ToolDefinition | ToolCall | AllowedTool | NamedToolChoice) -> None:
    """Refuse an object without the field that its type names, or with that of another type."""
    for kind in ("function", "custom", "allowed_tools"):
        is_there = getattr(given, kind, None) is not None
        if kind == given.type and not is_there:
            raise ValueError(f"Object missing required field `{kind}`")
        if kind != given.type and is_there:
            raise ValueError(f"Type {given.type!r} has no field `{kind}`")
