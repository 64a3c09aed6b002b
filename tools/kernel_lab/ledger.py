"""Which kernel, by the hash of its source, was found right and how fast on which GPU: cuda_kernels/VERIFIED.json.

An entry names the specialisations that were launched, as a source may be right with some macros and wrong with others.
Only runs on a GPU write it. CI prints the sources that have changed since they were verified. The table in
docs/benchmarks.md is made from it.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cuda_kernels import compile as compiling
from tools.kernel_lab.phases import without_nan

PATH = compiling.SOURCES / "VERIFIED.json"
ENGINE = "engine"  # not a source: steps of the whole engine
_MACHINE = ("gpu", "driver", "compiler", "torch")
_TIMES = ("us", "floor_us", "of_floor", "target", "reached", "peer", "times_faster")


def sources() -> list[str]:
    """Return the kernels' file names."""
    return sorted(path.name for path in compiling.SOURCES.glob("*.cu"))


def source_hash(source: str) -> str:
    """Hash a source with what it includes."""
    return hashlib.sha256(compiling.expand(source).encode()).hexdigest()


def read(path: Path | None = None) -> dict[str, Any]:
    """Return source -> what `record_checks` and `record_times` wrote; empty where nothing was ever verified."""
    path = path or PATH
    return json.loads(path.read_text()) if path.exists() else {}


def record_checks(
    environment: Mapping[str, Any], results: Mapping[str, Mapping[str, Mapping[str, Any]]], path: Path | None = None
) -> None:
    """Record what passed and what did not.

    A specialisation is verified where a check that launched it passed and none failed, a source where all its checks
    passed. What the same GPU verified of the same text before stays.

    Args:
        environment: gpu, driver, compiler, torch; sanitizer, what each of its checks ended with.
        results: Source -> check -> its result, with the specialisations it launched as `kernels`.
    """
    entries = read(path)
    for source, checks in results.items():
        stamp, before = {"sha256": source_hash(source), **_stamp(environment)}, entries.get(source, {})
        same = all(before.get(name) == stamp[name] for name in ("sha256", "gpu"))
        open_checks = {name: why for name, result in checks.items() if (why := _why_open(result))}
        passed = {name: result for name, result in checks.items() if name not in open_checks}
        errors = {name: result["error"] for name, result in passed.items() if "error" in result}
        worst = max(errors, key=lambda name: errors[name], default=None)
        entries[source] = {
            **stamp, "sanitizer": environment.get("sanitizer"), "checks": len(passed), "open": open_checks,
            "specialisations": sorted(_verified(checks, before["specialisations"] if same else ())),
            "times": before["times"] if same else {},
            "worst": None if worst is None else {"check": worst, "error": errors[worst]},
        }  # fmt: skip
    _write(entries, path)


def _why_open(result: Mapping[str, Any]) -> str | None:
    """Say why a check verified nothing; None where it passed."""
    why = result.get("failure") or result.get("skipped")
    return None if why is None else str(why)[:200]


def _verified(checks: Mapping[str, Mapping[str, Any]], before: Iterable[str]) -> set[str]:
    launched = [(result.get("kernels", ()), _why_open(result)) for result in checks.values()]
    found = {kernel for kernels, why in launched if why is None for kernel in kernels}
    return {*before, *found} - {kernel for kernels, why in launched if why for kernel in kernels}


def record_times(
    environment: Mapping[str, Any], kernels: Mapping[str, Mapping[str, Any]], engine: Mapping[str, Any],
    path: Path | None = None,
) -> None:  # fmt: skip
    """Record times of the engine and of sources that this GPU verified in their current version.

    Args:
        kernels: Source -> bench -> its result.
        engine: Measurement -> its result.
    """
    entries = read(path)
    for source, benches in kernels.items():
        entry = entries.get(source, {})
        if _is_verified(source, entry) and entry.get("gpu") == environment["gpu"]:
            entry["times"] = {name: _times(found) for name, found in benches.items() if "us" in found}
    measured = {name: _times(found) for name, found in engine.items() if "us" in found}
    if measured:
        entries[ENGINE] = {**_stamp(environment), "times": measured}
    _write(entries, path)


def best_peer(found: Mapping[str, Any]) -> tuple[str | None, float | None]:
    """Return the fastest peer that did the same work, and how many times as fast as it we are."""
    timed = {name: peer for name, peer in found.get("peers", {}).items() if peer.get("times_faster") is not None}
    whole = {name: peer["times_faster"] for name, peer in timed.items() if "alone" not in name}
    name = min(whole, key=lambda one: whole[one], default=None)
    return name, None if name is None else whole[name]


def _times(found: Mapping[str, Any]) -> dict[str, Any]:
    peer, times_faster = best_peer(found)
    values = {**found, "peer": peer, "times_faster": times_faster}
    return {name: values[name] for name in _TIMES if name in values}


def _stamp(environment: Mapping[str, Any]) -> dict[str, Any]:
    date = dt.datetime.now(dt.UTC).date().isoformat()
    return {**{name: environment.get(name) for name in _MACHINE}, "date": date}


def _write(entries: Mapping[str, Any], path: Path | None) -> None:
    (path or PATH).write_text(json.dumps(without_nan(entries), indent=1, sort_keys=True) + "\n")


def unverified(path: Path | None = None) -> list[str]:
    """Return the sources that no GPU has verified in their current version."""
    entries = read(path)
    return [name for name in sources() if not _is_verified(name, entries.get(name, {}))]


def _is_verified(source: str, entry: Mapping[str, Any]) -> bool:
    return entry.get("sha256") == source_hash(source) and not entry.get("open")
