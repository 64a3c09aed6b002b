"""How many cores a process may use, in file trees as Linux shows them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trio_llm.model.loading.cpu_threads import has_bfloat16_arithmetic, usable_cores


def write(root: Path, **files: str) -> None:
    """Write files; a name spells a slash as two underscores and a dot as DOT."""
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("DOT", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def write_processors(root: Path, cores: int, threads: int, packages: int = 1) -> range:
    """Write the topology of a machine; return its processors."""
    number = 0
    for package in range(packages):
        for _ in range(threads):
            for core in range(cores):
                topology = f"sys__devices__system__cpu__cpu{number}__topology__"
                write(root, **{topology + "core_id": f"{core}\n", topology + "physical_package_id": f"{package}\n"})
                number += 1
    return range(number)


def test_hardware_threads_of_a_core_count_once(tmp_path: Path) -> None:
    """Two packages of four cores with two threads are eight; of those the process may run on only what it may."""
    processors = write_processors(tmp_path, cores=4, threads=2, packages=2)
    assert usable_cores(tmp_path, processors) == 8
    assert usable_cores(tmp_path, [0, 4]) == 1
    assert usable_cores(tmp_path, [0, 1, 4, 9]) == 3


def test_processors_without_topology_are_cores(tmp_path: Path) -> None:
    """A system that does not tell has as many cores as processors."""
    assert usable_cores(tmp_path, range(5)) == 5


@pytest.mark.parametrize(("limit", "cores"), [("max 100000", 4), ("250000 100000", 2), ("50000 100000", 1)])
def test_the_quota_of_a_control_group_bounds_them(tmp_path: Path, limit: str, cores: int) -> None:
    """Version 2: of the group and of all above it, rounded down but never to none."""
    write(tmp_path, proc__self__cgroup="0::/a/b", sys__fs__cgroup__a__cpuDOTmax=limit)
    write(tmp_path, sys__fs__cgroup__a__b__cpuDOTmax="max 100000")
    assert usable_cores(tmp_path, range(4)) == cores


@pytest.mark.parametrize(("quota", "cores"), [("-1", 4), ("300000", 3), ("20000", 1)])
def test_so_does_the_quota_of_version_1(tmp_path: Path, quota: str, cores: int) -> None:
    """Version 1 has quota and period in files of their own; -1 is no limit."""
    write(
        tmp_path, proc__self__cgroup="3:cpu,cpuacct:/a\n1:cpuset:/", sys__fs__cgroup__cpu__a__cpuDOTcfs_quota_us=quota
    )
    write(tmp_path, sys__fs__cgroup__cpu__a__cpuDOTcfs_period_us="100000")
    assert usable_cores(tmp_path, range(4)) == cores


def test_this_machine_has_a_core() -> None:
    """The real files can be read."""
    assert usable_cores() >= 1


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("avx2 avx512f", False), ("avx512f avx512_bf16", True), ("amx_bf16", True), ("asimd bf16", True)],
)
def test_bfloat16_arithmetic_is_a_flag_of_the_processor(tmp_path: Path, flags: str, expected: bool) -> None:
    """What /proc/cpuinfo lists, on x86 and on ARM."""
    write(tmp_path, proc__cpuinfo=f"processor : 0\nflags : fpu {flags} sse\n")
    assert has_bfloat16_arithmetic(tmp_path) == expected
    assert not has_bfloat16_arithmetic(tmp_path / "nothing")


WATCH = """
import os, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"))

sys.meta_path.insert(0, Watch())
import trio_llm.model.load
"""


@pytest.mark.parametrize(
    ("given", "found"), [({}, "3000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")]
)
def test_openmps_threads_do_not_wait_on_the_kernels_cores(given: dict[str, str], found: str) -> None:
    """It is said before torch is loaded, which then reads it, and only where the user has not said otherwise."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    command = [sys.executable, "-c", WATCH]
    done = subprocess.run(command, env={**inherited, **given}, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [found]
