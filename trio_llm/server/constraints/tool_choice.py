"""The tools of a chat request: which may be called, whether one must be, and how this model writes calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import msgspec

from trio_llm.errors import InvalidRequestError
from trio_llm.grammar import GrammarSource
from trio_llm.server.bodies.types import ChatBody, NamedToolChoice, ToolDefinition
from trio_llm.server.constraints.response_format import asks_for_form
from trio_llm.server.constraints.tool_grammar import Mode, Tool, tool_grammar
from trio_llm.server.parsing.tools import ToolForm
from trio_llm.server.services import Services


@attrs.frozen
class ToolUse:
    """Tools as one request uses them.

    Attributes:
        form: How calls are written; None if the parser does not look for calls.
        offered: The tool definitions for the template.
        grammar: Grammar of the answer, or of its calls if another form is allowed `alongside`; None for no constraint.
        alongside: The answer may have the form of response_format instead.
    """

    form: ToolForm | None = None
    offered: list[dict[str, Any]] | None = None
    grammar: GrammarSource | None = None
    alongside: bool = True


def tool_use(services: Services, body: ChatBody) -> ToolUse:
    """Read `tools`, `tool_choice` and `parallel_tool_calls`.

    Raises:
        InvalidRequestError: A choice without tools or of an unknown tool, or the model's template has no tools.
    """
    if not body.tools:
        if body.tool_choice not in (None, "none"):
            raise InvalidRequestError("tool_choice needs tools.", param="tool_choice")
        return ToolUse()
    if body.tool_choice == "none":
        return ToolUse()
    form = services.tool_form
    if form is None and not services.declares_calls:
        raise InvalidRequestError("This model's chat template knows no tools.", param="tools")
    names = [tool.function.name for tool in body.tools]
    if len(set(names)) < len(names):
        raise InvalidRequestError("Two tools have the same name.", param="tools")
    chosen = _chosen(body.tools, body.tool_choice)
    offered: list[dict[str, Any]] = [msgspec.to_builtins(tool) for tool in body.tools]
    mode = _mode(body, chosen)
    if form is None and mode is not None:
        raise InvalidRequestError(
            "This model's calls have a form of its own (its response_template), to which answers cannot be held: only "
            "tool_choice 'auto' and 'none' are supported, without strict and without response_format.",
            param="tool_choice",
        )
    source = _grammar(services, body, form, chosen, mode) if form is not None and mode is not None else None
    return ToolUse(form, offered, source, alongside=mode != "required")


def _chosen(tools: Sequence[ToolDefinition], choice: object) -> Sequence[ToolDefinition]:
    """Return the tools that may be called: all, or the named one."""
    if not isinstance(choice, NamedToolChoice):
        return tools
    named = [tool for tool in tools if tool.function.name == choice.function.name]
    if not named:
        raise InvalidRequestError(
            f"tool_choice names {choice.function.name[:64]!r}, which is not among the tools.", param="tool_choice"
        )
    return named


def _mode(body: ChatBody, chosen: Sequence[ToolDefinition]) -> Mode | None:
    """Return the mode of `tool_grammar`; None if calls need no grammar."""
    if body.tool_choice not in (None, "auto"):
        return "required"
    if asks_for_form(body):
        return "alongside"
    return "auto" if any(tool.function.strict for tool in chosen) else None


def _grammar(
    services: Services, body: ChatBody, form: ToolForm, chosen: Sequence[ToolDefinition], mode: Mode
) -> GrammarSource:
    named = isinstance(body.tool_choice, NamedToolChoice)
    return tool_grammar(
        form,
        [Tool(t.function.name, t.function.parameters or {}, strict=t.function.strict is True) for t in chosen],
        mode=mode,
        parallel=body.parallel_tool_calls is not False and not named,
        added_tokens=services.tokenizer.added_tokens,
    )
