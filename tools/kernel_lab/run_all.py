"""`all`: everything that a short loan of a GPU can tell, the most telling first, whatever goes wrong on the way.

This process never touches the device. Each source, and each of the other parts, has a process of its own, alive from
the first phase to the last. A result is on disk as soon as it is there, whatever ends the run later. Every phase gets
a share of the budget; what it does not use goes to the ones after it.

In the folder: results.jsonl, a line per item; VERIFIED.json, the ledger; summary.txt; log.txt, what processes print.
"""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import attrs
import click

from tools.kernel_lab import ledger, table
from tools.kernel_lab.check import by_source
from tools.kernel_lab.parts import OTHERS, SOURCES
from tools.kernel_lab.process import PartProcess
from tools.kernel_lab.specialisations import ARCHS, attention, others

GRACE_S = 10.0  # after the budget, for what is under way


@attrs.frozen
class Stage:
    """A phase of some parts.

    Attributes:
        share: Of the budget, at most.
        together: At the same time: nothing is timed.
        times: As many times the usual limit an item may take before its process is ended.
    """

    phase: str
    parts: Sequence[str]
    share: float
    together: bool = False
    times: float = 1.0


STAGES = (
    Stage("machine", ("machine",), 0.08),
    Stage("prepare", SOURCES, 0.2, together=True, times=2),
    Stage("check", SOURCES, 0.25),
    Stage("steps", ("steps",), 0.2, times=2),
    Stage("time", SOURCES, 0.25),
    Stage("engine", ("engine",), 0.25, times=2),
    Stage("peers", SOURCES, 0.4, times=2),
    Stage("transformers", ("transformers",), 0.3, times=3),
    Stage("tools", ("tools",), 1.0, times=2),
)


@attrs.define(eq=False)
class Run:
    """One run.

    Attributes:
        item_s: Seconds that an item may take, as far as its stage does not say otherwise.
        results: Phase -> "part: item" -> result; of sources the item has the part in its name already.
    """

    folder: Path
    budget_s: float
    item_s: float
    sim: bool
    results: dict[str, dict[str, dict[str, Any]]] = attrs.field(factory=dict)
    _began: float = attrs.field(factory=time.monotonic)
    _lock: threading.Lock = attrs.field(factory=threading.Lock)

    @property
    def left_s(self) -> float:
        return max(0.0, self._began + self.budget_s - time.monotonic())

    def go(self, parts: Mapping[str, PartProcess], lines: IO[str]) -> None:
        """Give every stage its time."""
        for stage in STAGES:
            present = [parts[name] for name in stage.parts if name in parts]
            self.results[stage.phase] = {}
            stage_end = time.monotonic() + min(self.left_s, stage.share * self.budget_s)
            if stage.together:
                with ThreadPoolExecutor(max(1, len(present))) as threads:
                    list(threads.map(lambda part, s=stage, e=stage_end: self._one(part, s, e, lines), present))
            else:
                for index, part in enumerate(present):
                    now, remaining = time.monotonic(), len(present) - index
                    # Twice an equal part of what is left, so that the first, which tell most, may take longer.
                    self._one(part, stage, now + (stage_end - now) * min(1.0, 2 / remaining), lines)
            self._write_ledger()

    def _one(self, part: PartProcess, stage: Stage, until: float, lines: IO[str]) -> None:
        seconds = max(0.0, until - time.monotonic())
        command = {"phase": stage.phase, "seconds": seconds, "ceilings": self._ceilings}
        part.run(
            command, stage.times * self.item_s, self._began + self.budget_s + GRACE_S,
            lambda item, result: self._record(stage.phase, part.part, item, result, lines),
        )  # fmt: skip

    def _record(self, phase: str, part: str, item: str, result: dict[str, Any], lines: IO[str]) -> None:
        name = item if item.startswith(f"{part}: ") else f"{part}: {item}"
        at = round(time.monotonic() - self._began, 1)
        with self._lock:
            self.results[phase][name] = result
            lines.write(json.dumps({"at": at, "phase": phase, "item": name, "result": result}, default=str) + "\n")
            lines.flush()
        click.echo(f"{at:6.1f} {phase}: {name}{_outcome(result)}", err=True)

    @property
    def _ceilings(self) -> dict[str, float]:
        found = self.results.get("machine", {})
        names = ("read_gb_s", "copy_gb_s", "bf16_tflop_s")
        values = {name: found.get(f"machine: {name}", {}).get("value") for name in names}
        return {name: float("nan") if value is None else value for name, value in values.items()}

    def _write_ledger(self) -> None:
        """Write what is verified and timed so far; a simulated ledger has a name that says so."""
        path = self.folder / ("VERIFIED.simulated.json" if self.sim else "VERIFIED.json")
        environment = {"gpu": "unknown", **self.results["machine"].get("machine: environment", {})}
        if path.exists():
            path.unlink()  # made anew of all that is known, on top of what is known from before
        if not self.sim and ledger.PATH.exists():
            shutil.copy(ledger.PATH, path)
        environment["sanitizer"] = self.results.get("tools")
        if checks := self.results.get("check"):
            ledger.record_checks(environment, by_source(checks), path)
            ledger.record_times(environment, self.times(), self.engine_times(), path)

    def times(self) -> dict[str, dict[str, Any]]:
        """Return source -> bench -> times, with the peers' where those were measured."""
        measured = [self.results.get(phase, {}) for phase in ("time", "peers")]
        merged = {**measured[0], **{name: found for name, found in measured[1].items() if "us" in found}}
        return by_source(merged)

    def engine_times(self) -> dict[str, Any]:
        """Return what was measured of whole steps."""
        return {**self.results.get("steps", {}), **self.results.get("transformers", {})}

    def summary(self) -> Iterator[str]:
        """Yield the lines of the summary."""
        for phase, found in self.results.items():
            failed, skipped = (sum(kind in result for result in found.values()) for kind in ("failure", "skipped"))
            seconds = sum(result.get("seconds") or 0 for result in found.values())
            passed = len(found) - failed - skipped
            yield f"{phase}: {passed} done, {failed} failed, {skipped} left out, {seconds:.0f} s"
        for name, result in self.results["machine"].items():
            yield f"{name} {json.dumps({key: value for key, value in result.items() if key != 'seconds'}, default=str)}"
        yield from table.checks(by_source(self.results["check"]))
        yield from table.times(self.times(), self.engine_times(), limit=None)
        yield from self._specialisations()
        for kind in ("failure", "skipped"):
            for phase, found in self.results.items():
                for name, result in found.items():
                    if kind in result:
                        yield f"{phase}: {name}{_outcome(result)}"

    def _specialisations(self) -> Iterator[str]:
        """Say how many of the specialisations that models use were launched and found right."""
        wanted: dict[str, set[str]] = {}
        for kernel in (*attention(ARCHS[2]), *others()):
            wanted.setdefault(kernel.source, set()).add(kernel.specialisation)
        entries = ledger.read(self.folder / ("VERIFIED.simulated.json" if self.sim else "VERIFIED.json"))
        for source, names in sorted(wanted.items()):
            verified = set(entries.get(source, {}).get("specialisations", ()))
            of_gate = f"{len(names & verified)} of the {len(names)} that are compiled for every architecture"
            yield f"{source}: {len(verified)} specialisations verified, {of_gate}"

    @property
    def failed(self) -> bool:
        return any("failure" in result for found in self.results.values() for result in found.values())


def _outcome(result: Mapping[str, Any]) -> str:
    for kind, word in (("failure", "failed"), ("skipped", "left out")):
        if kind in result:
            return f": {word}: {str(result[kind])[:300]}"
    return ""


def run(
    folder: Path, budget_s: float, item_s: float, *, sim: bool, only: Sequence[str], troubles: Mapping[str, str]
) -> bool:
    """Do it all; return whether nothing failed.

    Args:
        item_s: As in Run.
        only: Parts; all where empty.
        troubles: Part -> "fault" or "hang", to rehearse.
    """
    folder.mkdir(parents=True, exist_ok=True)
    this = Run(folder, budget_s, item_s, sim)
    parts: dict[str, PartProcess] = {}
    with (folder / "log.txt").open("a") as log, (folder / "results.jsonl").open("w") as lines:
        try:
            for name in (*OTHERS[:1], *SOURCES, *OTHERS[1:]):
                if not only or name in only:
                    options = ["--sim"] * sim + (["--trouble", troubles[name]] if name in troubles else [])
                    parts[name] = PartProcess.start(name, options, log)
            this.go(parts, lines)
        finally:
            for part in parts.values():
                part.end()
    text = "\n".join(this.summary())
    (folder / "summary.txt").write_text(text + "\n")
    sys.stdout.write(text + "\n")
    return not this.failed
