"""The file that a command writes: never one that it reads, and refused before any work is done for it."""

from __future__ import annotations

from pathlib import Path

import click

_OPTION = "'--output' / '-o'"


def check_output(path: Path, source: Path) -> None:
    """Refuse a file that the command reads. Raises click.BadParameter."""
    if path.exists() and path.samefile(source):
        raise click.BadParameter(f"'{path}' is what the command reads: it would be overwritten.", param_hint=_OPTION)


def cannot_write(path: Path, error: OSError) -> click.BadParameter:
    """Return the error about a file that cannot be opened for writing."""
    return click.BadParameter(f"'{path}' cannot be written: {error.strerror}.", param_hint=_OPTION)
