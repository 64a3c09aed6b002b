"""The group that all commands belong to: hints for commands that do not exist, and what Ctrl-C ends with."""

from __future__ import annotations

import difflib
from typing import Any

import click

from trio_llm.cli.hints import COMMANDS

INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class CommandGroup(click.Group):
    """Commands that end with exit code 130 after Ctrl-C, and with the error itself where a nursery wrapped it."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; one that Ollama or vLLM has is refused with what to do instead."""
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            raise click.UsageError(f"No such command: {name}. {self._hint(name)}", ctx)
        return super().resolve_command(ctx, args)

    def _hint(self, name: str) -> str:
        if name in COMMANDS:
            return COMMANDS[name]
        if close := difflib.get_close_matches(name, self.commands, 1):
            return f"Did you mean {close[0]}?"
        if "/" in name:
            return f"To serve that model, use `trio-llm serve {name}`."
        return f"There are {', '.join(sorted(self.commands))}."

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Read the options before the command."""
        try:
            return super().make_context(*args, **kwargs)
        except click.UsageError as error:
            raise _in_one_line(error) from None

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            raise _in_one_line(error) from None
        except KeyboardInterrupt:
            ctx.exit(INTERRUPTED)
        except BaseExceptionGroup as group:
            if group.subgroup(KeyboardInterrupt) is not None:
                ctx.exit(INTERRUPTED)
            raise innermost(group) from None


def _in_one_line(error: click.UsageError) -> click.UsageError:
    """Leave out the usage that click prints before the error of a context: the error says what is wrong."""
    if not isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.ctx = None
    return error


def innermost(error: BaseException) -> BaseException:
    """Take the one exception out of the nurseries that wrapped it; several stay a group."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
