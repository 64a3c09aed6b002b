"""Which kernel, by the hash of its source, was found right on which GPU: cuda_kernels/VERIFIED.json."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cuda_kernels import compile as compiling

PATH = compiling.SOURCES / "VERIFIED.json"


def sources() -> list[str]:
    """Return the kernels' file names."""
    return sorted(path.name for path in compiling.SOURCES.glob("*.cu"))


def source_hash(source: str) -> str:
    """Hash a source with what it includes."""
    return hashlib.sha256(compiling.expand(source).encode()).hexdigest()


def read(path: Path = PATH) -> dict[str, Any]:
    """Return source -> {sha256, gpu, driver, compiler, date, checks}; empty where nothing was ever verified."""
    return json.loads(path.read_text()) if path.exists() else {}


def record(environment: Mapping[str, Any], checks: Mapping[str, Mapping[str, Any]], path: Path = PATH) -> None:
    """Write down the sources all of whose checks passed.

    Args:
        environment: gpu, driver, compiler.
        checks: Source -> check name -> its result (a failed or skipped one leaves the source as it was).
    """
    entries = read(path)
    for source, results in checks.items():
        if any("failure" in result or "skipped" in result for result in results.values()):
            continue
        date = dt.datetime.now(dt.UTC).date().isoformat()
        entries[source] = {"sha256": source_hash(source), **environment, "date": date, "checks": dict(results)}
    path.write_text(json.dumps(entries, indent=1, sort_keys=True) + "\n")


def unverified(path: Path = PATH) -> list[str]:
    """Return the sources whose present text no GPU has run."""
    entries = read(path)
    return [name for name in sources() if entries.get(name, {}).get("sha256") != source_hash(name)]
