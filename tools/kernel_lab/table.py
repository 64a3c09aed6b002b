"""Results as tables: the forty lines that a run ends with, and what docs/benchmarks.md says of speed on a GPU."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tools.kernel_lab import ledger

HEAD = ("kernel", "measurement", "µs", "of floor", "first / good", "reached", "fastest peer", "times as fast")
MAX_LINES = 40


def measured(path: Path | None = None) -> str:
    """Return the text between the two marks of docs/benchmarks.md."""
    entries = ledger.read(path)
    if not entries:
        return "Nothing has been measured on a GPU: no kernel has run on one, and every speed is unproven."
    waiting = ledger.unverified(path)
    known = {name: entry for name, entry in entries.items() if name not in waiting}
    machines = sorted({f"{e['gpu']}, driver {e['driver']}, {e['compiler']}, {e['date']}" for e in known.values()})
    lines = (
        [f"Measured on {'; '.join(machines)}. The floor is what this machine's own bandwidth allows."] if known else []
    )
    rows = [
        (name, bench, found) for name, entry in sorted(known.items()) for bench, found in entry.get("times", {}).items()
    ]
    if rows:
        lines += ["", *_markdown(_row(*row) for row in rows)]
    if waiting:
        lines += ["", f"Not verified on a GPU in their current version: {', '.join(f'`{name}`' for name in waiting)}."]
    return "\n".join(lines).strip()


def put(text: str, document: str, name: str) -> str:
    """Return a document with the text between the marks of a name replaced."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, rest = document.split(begin)
    return f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}"


def _markdown(rows: Iterator[tuple[str, ...]]) -> Iterator[str]:
    for cells in (HEAD, ("---",) * len(HEAD), *rows):
        yield f"| {' | '.join(cells)} |"


def _row(source: str, bench: str, found: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        source, bench, _number(found.get("us"), ".1f"), _number(found.get("of_floor"), ".0%"), found.get("target", "-"),
        found.get("reached", "-"), found.get("peer") or "-", _number(found.get("times_faster"), ".2f"),
    )  # fmt: skip


def _number(value: float | None, form: str) -> str:
    return "-" if value is None or math.isnan(value) else format(value, form)


def times(
    kernels: Mapping[str, Mapping[str, Any]], engine: Mapping[str, Any], *, limit: int | None = MAX_LINES
) -> Iterator[str]:
    """Yield the table a bench ends with, a line per measurement, failed and skipped ones too; at most `limit`."""
    rows: list[tuple[str, ...]] = [HEAD]
    measured = [(source, name, found) for source, benches in kernels.items() for name, found in benches.items()]
    for source, name, found in [*measured, *((ledger.ENGINE, name, found) for name, found in engine.items())]:
        if "us" not in found:
            rows.append((source, name, *"---", "skipped" if "skipped" in found else "failed", "-", "-"))
            continue
        peer, times_faster = ledger.best_peer(found)
        rows.append(_row(source, name, {**found, "peer": peer, "times_faster": times_faster}))
    yield from _aligned(rows[:limit])


def checks(results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Iterator[str]:
    """Yield the table a check ends with, a line per source."""
    rows: list[tuple[str, ...]] = [("kernel", "checks", "passed", "largest error", "of")]
    for source, found in sorted(results.items()):
        passed = {name: r for name, r in found.items() if "failure" not in r and "skipped" not in r}
        errors = {name: r["error"] for name, r in passed.items() if "error" in r}
        worst = max(errors, key=lambda name: errors[name], default="-")
        rows.append((source, str(len(found)), str(len(passed)), _number(errors.get(worst), ".1e"), worst[:60]))
    yield from _aligned(rows)


def _aligned(rows: list[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
