"""Models of random weights for benchmarks: real proportions, as narrow as the machine needs them."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from trio_llm.config import EngineConfig
from trio_llm.model.load import load_runner
from trio_llm.model.runner import Runner

PAGE_BYTES = 4096


@contextlib.contextmanager
def loaded(shape: dict[str, Any], **settings: Any) -> Iterator[Runner]:
    """Load a config.json of this content with dummy weights."""
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(shape))
        runner = load_runner(EngineConfig(model=directory, load_format="dummy", **settings))
        try:
            yield runner
        finally:
            runner.close()


def resident_bytes() -> int:
    """Return what of this process is in memory."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * PAGE_BYTES


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Write a median and its range."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def machine() -> str:
    """Describe where the figures come from."""
    with Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
        processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
    return (
        f"{processor}, {len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads, Python "
        f"{platform.python_version()}, torch {torch.__version__}, load average before the run {os.getloadavg()[0]:.1f}"
    )
