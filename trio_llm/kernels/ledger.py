"""Which kernel, by the hash of its source, was found right and how fast on which GPU: cuda_kernels/VERIFIED.json.

Only runs on a GPU write it. CI prints which sources it does not know as they are now; the README's table is made of it.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cuda_kernels import compile as compiling
from trio_llm.kernels.phases import without_nan

PATH = compiling.SOURCES / "VERIFIED.json"
ENGINE = "engine"  # beside the sources: steps of the whole engine
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
    """Write down the sources all of whose checks passed.

    Args:
        environment: gpu, driver, compiler, torch.
        results: Source -> check -> its result; with a failed or skipped one the source stays as it was.
    """
    entries = read(path)
    for source, checks in results.items():
        if any("failure" in result or "skipped" in result for result in checks.values()):
            continue
        errors = {name: result["error"] for name, result in checks.items() if "error" in result}
        worst = max(errors, key=lambda name: errors[name], default=None)
        stamp, before = {"sha256": source_hash(source), **_stamp(environment)}, entries.get(source, {})
        same = all(before.get(name) == stamp[name] for name in ("sha256", "gpu"))
        entries[source] = {
            **stamp, "checks": len(checks), "times": before["times"] if same else {},
            "worst": None if worst is None else {"check": worst, "error": errors[worst]},
        }  # fmt: skip
    _write(entries, path)


def record_times(
    environment: Mapping[str, Any], kernels: Mapping[str, Mapping[str, Any]], engine: Mapping[str, Any],
    path: Path | None = None,
) -> None:  # fmt: skip
    """Write down times: of sources that are verified as they are now, on this GPU, and of the engine.

    Args:
        kernels: Source -> bench -> its result.
        engine: Measurement -> its result.
    """
    entries = read(path)
    for source, benches in kernels.items():
        entry = entries.get(source, {})
        if entry.get("sha256") == source_hash(source) and entry.get("gpu") == environment["gpu"]:
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
    """Return the sources whose present text no GPU has run."""
    entries = read(path)
    return [name for name in sources() if entries.get(name, {}).get("sha256") != source_hash(name)]
