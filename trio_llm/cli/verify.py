"""`trio-llm verify`: a table of how far a model is from transformers, and an exit code."""

from __future__ import annotations

import json
import sys
from typing import Any

import attrs
import click

from trio_llm.cli.show import columns
from trio_llm.config import EngineConfig
from trio_llm.verify.compare import Row, verify


def run(model: str | None, revision: str | None, device: Any, *, as_json: bool) -> int:
    """Compare and print; return 1 if a row differs."""
    engine = EngineConfig(model=model, revision=revision, device=device)
    rows = verify(engine, lambda what: click.echo(f"{what} ...", err=True) if sys.stderr.isatty() else None)
    if as_json:
        for row in rows:
            click.echo(json.dumps({**attrs.asdict(row), "ok": row.ok}))
    else:
        heads = ("WAY", "LARGEST ERROR, NATS", "ALLOWED", "EQUAL TOKENS", "RESULT")
        click.echo(columns([heads, *map(_cells, rows)]))
    return 0 if all(row.ok for row in rows) else 1


def _cells(row: Row) -> tuple[str, ...]:
    equal = f"{row.equal} / {row.tokens}"
    return (row.way, f"{row.error:.1e}", f"{row.bound:.1e}", equal, "equal" if row.ok else "DIFFERS")
