"""Results of a benchmark: medians with ranges, as a table or as JSON."""

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
    """One measured quantity, with a value per repetition."""

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
"""The settings of a row of the table, and its figures."""


def show(title: str, rows: Sequence[Row], *, as_json: bool) -> None:
    """Print the rows, all with the same figures, and the machine."""
    if as_json:
        row_objects = [{**settings, "figures": {f.name: f.as_object() for f in figures}} for settings, figures in rows]
        about = {"benchmark": title, "version": trio_llm.__version__, "machine": machine(), "rows": row_objects}
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
    """Return the percentile by nearest rank; `share` is from 0 to 1."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def machine() -> str:
    """Describe where the figures come from."""
    with Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
        processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    return f"{processor}, {cores} cores, Python {platform.python_version()}, load average {load:.1f}"
