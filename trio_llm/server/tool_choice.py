"""What a chat request says of tools: which may be called, whether one must be, and how this model writes calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import msgspec

from trio_llm.errors import InvalidRequestError
from trio_llm.grammar import GrammarSource
from trio_llm.server.parsing.tools import ToolForm
from trio_llm.server.requests import ChatBody, NamedToolChoice, ToolDefinition
from trio_llm.server.services import Services
from trio_llm.server.structured import asks_for_form
from trio_llm.server.tool_grammar import Mode, Tool, tool_grammar


@attrs.frozen
class ToolUse:
    """Tools as one request uses them.

    Attributes:
        form: How calls are written; None where none are looked for.
        shown: The definitions that the template shows to the model.
        grammar: What the answer is held to, or its calls where they stand `beside` another form; None where the
            model is free.
        beside: The answer may be of the other form that was asked for instead.
    """

    form: ToolForm | None = None
    shown: list[dict[str, Any]] | None = None
    grammar: GrammarSource | None = None
    beside: bool = True


def tool_use(services: Services, body: ChatBody) -> ToolUse:
    """Read `tools`, `tool_choice` and `parallel_tool_calls`.

    Raises:
        InvalidRequestError: A choice without tools or of an unknown one, or a model whose template knows no tools.
    """
    if not body.tools:
        if body.tool_choice not in (None, "none"):
            raise InvalidRequestError("tool_choice needs tools.", param="tool_choice")
        return ToolUse()
    if body.tool_choice == "none":
        return ToolUse()
    form = services.tool_form
    if form is None:
        raise InvalidRequestError("This model's chat template knows no tools.", param="tools")
    names = [tool.function.name for tool in body.tools]
    if len(set(names)) < len(names):
        raise InvalidRequestError("Two tools have the same name.", param="tools")
    chosen = _chosen(body.tools, body.tool_choice)
    shown: list[dict[str, Any]] = [msgspec.to_builtins(tool) for tool in body.tools]
    mode = _mode(body, chosen)
    source = _grammar(services, body, form, chosen, mode) if mode is not None else None
    return ToolUse(form, shown, source, beside=mode != "required")


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
    """Say how calls bind: one that must be, one that may be beside another form, or one of a strict tool."""
    if body.tool_choice not in (None, "auto"):
        return "required"
    if asks_for_form(body):
        return "beside"
    return "auto" if any(tool.function.strict for tool in chosen) else None


def _grammar(
    services: Services, body: ChatBody, form: ToolForm, chosen: Sequence[ToolDefinition], mode: Mode
) -> GrammarSource:
    named = isinstance(body.tool_choice, NamedToolChoice)
    return tool_grammar(
        form,
        [Tool(tool.function.name, tool.function.parameters or {}) for tool in chosen],
        mode=mode,
        parallel=body.parallel_tool_calls is not False and not named,
        special_tokens=services.tokenizer.special_tokens,
    )
