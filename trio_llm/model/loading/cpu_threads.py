"""How many threads a CPU's operations can use in parallel.

torch counts the machine's processors. In a container that may use four of sixty-four, or has a CPU quota, most of that
many threads would wait, and the others for them. Two hardware threads of one core share its arithmetic units.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from trio_llm.model.loading.memory_budget import control_groups, read_file


def usable_cores(root: Path = Path("/"), processors: Iterable[int] | None = None) -> int:
    """Return the number of physical cores that this process may use, limited by its control groups' quotas.

    Args:
        root: Parent of /proc and /sys.
        processors: Processors that the process may use; default: from the system.
    """
    processors = os.sched_getaffinity(0) if processors is None else processors
    cores = {_core_of(root, number) for number in processors}
    return min([len(cores), *(max(1, int(quota)) for quota in _quotas(root))])


def _core_of(root: Path, processor: int) -> tuple[str, ...]:
    """Return an identity that the hardware threads of one core share."""
    topology = root / f"sys/devices/system/cpu/cpu{processor}/topology"
    if not (topology / "core_id").is_file():
        return (str(processor),)
    return tuple((topology / name).read_text().strip() for name in ("physical_package_id", "core_id"))


def _quotas(root: Path) -> Iterator[float]:
    """Yield each control group's CPU quota in processors, both versions; nothing for no limit."""
    for group in control_groups(root, ""):
        quota, period = (read_file(group / "cpu.max") or "max 1").split()
        if quota != "max":
            yield int(quota) / int(period)
    for group in control_groups(root, "cpu"):
        quota, period = read_file(group / "cpu.cfs_quota_us"), read_file(group / "cpu.cfs_period_us")
        if quota and period and int(quota) > 0:  # -1 for no limit
            yield int(quota) / int(period)


def has_bfloat16_arithmetic(root: Path = Path("/")) -> bool:
    """Return whether the processor multiplies bfloat16 natively: avx512_bf16 or amx_bf16, on ARM bf16."""
    cpuinfo = root / "proc/cpuinfo"
    words = set(cpuinfo.read_text().split()) if cpuinfo.is_file() else set[str]()
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})
