"""The tools of a chat request: which may be called, whether one must be, and how this model writes calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs

from trio_llm.errors import InvalidRequestError
from trio_llm.grammar import GrammarSource
from trio_llm.server.bodies.tools import AllowedTools, Function, NamedToolChoice
from trio_llm.server.bodies.types import ChatBody
from trio_llm.server.constraints.custom_tools import as_functions, offered
from trio_llm.server.constraints.response_format import asks_for_form
from trio_llm.server.constraints.tool_grammar import Mode, Tool, tool_grammar
from trio_llm.server.parsing.tools import ToolForm
from trio_llm.server.services import Services


@attrs.frozen
class ToolUse:
    """Tools as one request uses them.

    Attributes:
        form: How calls are written; None if the parser does not look for calls.
        functions: What the model is offered; None if nothing is.
        grammar: Grammar of the answer, or of its calls if another form is allowed `alongside`; None for no constraint.
        alongside: The answer may have the form of response_format instead.
    """

    form: ToolForm | None = None
    functions: Sequence[Function] | None = None
    grammar: GrammarSource | None = None
    alongside: bool = True

    @property
    def offered(self) -> list[dict[str, Any]] | None:
        """The definitions for the template."""
        return None if self.functions is None else offered(self.functions)


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
    functions = as_functions(services, body.tools)
    if len({function.name for function in functions}) < len(functions):
        raise InvalidRequestError("Two tools have the same name.", param="tools")
    chosen = _chosen(functions, body.tool_choice)
    mode = _mode(body, chosen)
    if form is None and mode == "auto" and not any(function.strict for function in chosen):
        mode = None  # The model calls what it is offered; no grammar can hold it to that.
    if form is None and mode is not None:
        raise InvalidRequestError(
            "This model's calls have a form of its own (its response_template), to which answers cannot be held: only "
            "tool_choice 'auto' and 'none' are supported, without strict and without response_format.",
            param="tool_choice",
        )
    source = _grammar(services, body, form, chosen, mode) if form is not None and mode is not None else None
    shown = chosen if _allowed(body) is not None else functions
    return ToolUse(form, shown, source, alongside=mode != "required")


def _allowed(body: ChatBody) -> AllowedTools | None:
    """Return the only tools that may be called, if the choice names such."""
    return body.tool_choice.allowed_tools if isinstance(body.tool_choice, NamedToolChoice) else None


def _chosen(functions: Sequence[Function], choice: object) -> Sequence[Function]:
    """Return the functions that may be called: all, or the named ones."""
    if not isinstance(choice, NamedToolChoice):
        return functions
    names = set(choice.names)
    if unknown := sorted(names - {function.name for function in functions}):
        raise InvalidRequestError(
            f"tool_choice names {unknown[0][:64]!r}, which is not among the tools.", param="tool_choice"
        )
    return [function for function in functions if function.name in names]


def _mode(body: ChatBody, chosen: Sequence[Function]) -> Mode | None:
    """Return the mode of `tool_grammar`; None if calls need no grammar."""
    choice = body.tool_choice
    if choice == "required" or (isinstance(choice, NamedToolChoice) and choice.must_call):
        return "required"
    if asks_for_form(body):
        return "alongside"
    return "auto" if _allowed(body) is not None or any(function.strict for function in chosen) else None


def _grammar(
    services: Services, body: ChatBody, form: ToolForm, chosen: Sequence[Function], mode: Mode
) -> GrammarSource:
    named = isinstance(body.tool_choice, NamedToolChoice) and _allowed(body) is None
    return tool_grammar(
        form,
        [Tool(function.name, function.parameters or {}, strict=function.strict is True) for function in chosen],
        mode=mode,
        parallel=body.parallel_tool_calls is not False and not named,
        added_tokens=services.tokenizer.added_tokens,
    )
