from __future__ import annotations

from pathlib import Path

import pytest

from trio_llm.model.loading.memory_budget import available_bytes

MIB = 2**20
MACHINE = "MemTotal:  9000000 kB\nMemAvailable:    102400 kB\n"


def tree(root: Path, files: dict[str, str]) -> Path:
    """Write files under a pretended root directory."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_without_control_groups_the_machine_decides(tmp_path: Path) -> None:
    """MemAvailable, in bytes, is what there is."""
    assert available_bytes(tree(tmp_path, {"proc/meminfo": MACHINE})) == 100 * MIB


@pytest.mark.parametrize(
    ("limit", "available"), [("max", 100), (str(60 * MIB), 60 - 50 + 20), (str(40 * MIB), 40 - 50 + 20), ("1", 0)]
)
@pytest.mark.parametrize("path", ["", "a", "a/b"])
def test_the_tightest_control_group_decides(tmp_path: Path, limit: str, available: int, path: str) -> None:
    """A limit of the process's own group, or of any above it, counts what is in use less what can be dropped."""
    group = f"sys/fs/cgroup/{path}"
    files = {
        "proc/meminfo": MACHINE,
        "proc/self/cgroup": "0::/a/b\n",
        f"{group}/memory.max": limit + "\n",
        f"{group}/memory.current": f"{50 * MIB}\n",
        f"{group}/memory.stat": f"anon {30 * MIB}\nactive_file 0\ninactive_file {20 * MIB}\n",
    }
    assert available_bytes(tree(tmp_path, files)) == available * MIB


def test_version_1_control_groups_count_too(tmp_path: Path) -> None:
    """Old kernels name the same numbers differently."""
    files = {
        "proc/meminfo": MACHINE,
        "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/docker/x\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{30 * MIB}\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{25 * MIB}\n",
        "sys/fs/cgroup/memory/memory.stat": f"total_inactive_file {1 * MIB}\n",
    }
    assert available_bytes(tree(tmp_path, files)) == 6 * MIB
