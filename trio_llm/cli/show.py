"""Tables for people: the settings and their sources, and what machine this is."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import trio_llm
from trio_llm.cli.options import as_text
from trio_llm.cli.settings import Settings, fields

_PACKAGES = (
    "trio", "quart", "quart-trio", "hypercorn", "h11", "torch", "numpy", "safetensors", "tokenizers", "attrs",
    "msgspec", "prometheus-client", "cupy-cuda12x", "cupy-cuda13x", "cuda-bindings",
)  # fmt: skip


def settings_table(settings: Settings) -> str:
    """Write each setting, its value and where the value came from; secrets are only counted."""
    rows = []
    for key, attribute in fields():
        section, name = key.split(".")
        value = getattr(getattr(settings.config, section), name)
        text = f"({len(value)} given)" if attribute.metadata["secret"] else as_text(value)
        rows.append((key, text, settings.sources[key]))
    return columns([("SETTING", "VALUE", "SOURCE"), *rows])


def environment_report() -> str:
    """Write versions and hardware; nothing that identifies a person or a machine."""
    rows = [("trio-llm", trio_llm.__version__), ("python", platform.python_version()), ("system", platform.platform())]
    for package in _PACKAGES:
        try:
            rows.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            continue
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    rows += [
        ("processor", _processor()),
        ("cores usable", str(len(os.sched_getaffinity(0)))),
        ("memory", f"{memory_bytes / 2**30:.1f} GiB"),
        ("gpu", _gpu()),
    ]
    return columns(rows)


def _processor() -> str:
    with Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
        return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        return f"none that torch {torch.__version__} can use"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{', '.join(names)} (CUDA {torch.version.cuda})"


def columns(rows: list[tuple[str, ...]]) -> str:
    """Align the cells of rows."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
