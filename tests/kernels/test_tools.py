"""NVIDIA's tools, with stand-ins on the path: what they are asked, and what is made of their answers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tools.kernel_lab import tools
from tools.kernel_lab.phases import Skip

PROFILE = """==PROF== Connected to process 7
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","7","paged_attention(const io_t *)","gpu__time_duration.sum","nsecond","9,088"
"0","7","paged_attention(const io_t *)","something else","%","1"
"1","7","gemv(const io_t *)","gpu__time_duration.sum","nsecond","50,000"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put an empty folder in the path's place."""
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def tool(folder: Path, name: str, script: str) -> None:
    """Write an executable."""
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_without_the_tools_their_phases_are_skipped(folder: Path) -> None:
    """An absent tool is a reason, not a failure."""
    with pytest.raises(Skip, match="no compute-sanitizer here"):
        tools.sanitize("memcheck", ["check"], 10)
    with pytest.raises(Skip, match="no ncu here"):
        tools.profile(["once"], 10)


def test_the_sanitizer_runs_this_program_unpooled(folder: Path) -> None:
    """It gets the check's name, an exit code of its own, this Python and memory that torch does not pool."""
    tool(folder, "compute-sanitizer", f'echo "$@" "$PYTORCH_NO_CUDA_MEMORY_CACHING" > {folder}/asked')
    for check, more in (("racecheck", []), ("memcheck", ["--report-api-errors", "no"])):
        assert tools.sanitize(check, ["check", "--small"], 10) == {"clean": True}
        asked = (folder / "asked").read_text().split()
        expected = ["--tool", check, "--error-exitcode", "9", *more, sys.executable, "-m", "tools.kernel_lab", "check"]
        assert asked == [*expected, "--small", "1"]


def test_what_the_sanitizer_finds_is_a_failure(folder: Path) -> None:
    """Its last words are in the message."""
    tool(folder, "compute-sanitizer", "echo 'Invalid __global__ read of size 16'; exit 9")
    with pytest.raises(RuntimeError, match="exit code 9: Invalid __global__ read"):
        tools.sanitize("memcheck", ["check"], 10)


def test_a_sanitizer_that_refuses_the_device_found_nothing(folder: Path) -> None:
    """It did not look: that is neither a failure nor a clean run."""
    tool(folder, "compute-sanitizer", "echo '========= Error: Device not supported. See the manual'; exit 9")
    with pytest.raises(Skip, match=r"refuses this device: =.*Device not supported"):
        tools.sanitize("memcheck", ["check"], 10)


def test_a_tool_without_end_is_skipped(folder: Path) -> None:
    """Beyond its limit it is ended, and that is said."""
    tool(folder, "compute-sanitizer", "exec /bin/sleep 60")
    with pytest.raises(Skip, match="not done within 0 s"):
        tools.sanitize("memcheck", ["check"], 0.1)


def test_profiles_are_read(folder: Path) -> None:
    """Metrics by kernel; no permission for the counters is a reason to skip."""
    (folder / "profile").write_text(PROFILE)
    tool(folder, "ncu", f'echo "$@" > {folder}/asked; while read -r line; do echo "$line"; done < {folder}/profile')
    assert tools.profile(["once"], 10) == {
        "paged_attention": {"gpu__time_duration.sum": "9,088 nsecond"},
        "gemv": {"gpu__time_duration.sum": "50,000 nsecond"},
    }
    assert "--clock-control none" in (folder / "asked").read_text()
    tool(folder, "ncu", "echo '==ERROR== ERR_NVGPUCTRPERM'; exit 1")
    with pytest.raises(Skip, match="no permission"):
        tools.profile(["once"], 10)
    tool(folder, "ncu", "echo broken; exit 3")
    with pytest.raises(RuntimeError, match="exit code 3: broken"):
        tools.profile(["once"], 10)
