"""Figures of a benchmark: every one a median with its range, as a table for people or as JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs
import click

import trio_llm


@attrs.frozen
class Figure:
    """What one thing measured came to, once a repetition."""

    name: str
    unit: str
    values: tuple[float, ...]
    digits: int = 1

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def __str__(self) -> str:
        low, high = min(self.values), max(self.values)
        return f"{self.median:.{self.digits}f} ({low:.{self.digits}f}-{high:.{self.digits}f})"

    def as_object(self) -> dict[str, object]:
        """Return it for JSON."""
        low, high = min(self.values), max(self.values)
        return {"unit": self.unit, "median": self.median, "min": low, "max": high, "values": list(self.values)}


Row = tuple[Mapping[str, object], Sequence[Figure]]
"""What was set for a row of the table, and what came out."""


def show(title: str, rows: Sequence[Row], *, as_json: bool) -> None:
    """Print the rows, all with the same figures, with the machine that they come from."""
    if as_json:
        told = [{**settings, "figures": {f.name: f.as_object() for f in figures}} for settings, figures in rows]
        about = {"benchmark": title, "version": trio_llm.__version__, "machine": machine(), "rows": told}
        click.echo(json.dumps(about, indent=2))
        return
    settings, figures = rows[0]
    lines = [
        [*settings, *(f"{figure.name} {figure.unit}" for figure in figures)],
        ["---"] * (len(settings) + len(figures)),
    ]
    lines += [[*map(str, settings.values()), *map(str, figures)] for settings, figures in rows]
    click.echo(f"{title}: medians (ranges) of {len(figures[0].values)} repetitions\n{machine()}\n")
    click.echo("\n".join("| " + " | ".join(cells) + " |" for cells in lines))


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which this share of the values lies (nearest rank)."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def machine() -> str:
    """Describe where the figures come from."""
    with Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
        processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    return f"{processor}, {cores} cores, Python {platform.python_version()}, load average {load:.1f}"
