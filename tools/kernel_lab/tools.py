"""Runs kernels in a new process under NVIDIA's tools: compute-sanitizer and Nsight Compute."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from tools.kernel_lab.phases import Skip

# Without torch's pooling each tensor is a separate allocation, so memcheck sees accesses past its end.
_UNPOOLED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
METRICS = (
    "gpu__time_duration.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "l1tex__data_bank_conflicts_pipe_lsu.sum",
)
PROFILED = ("paged_attention", "gemv")
# What compute-sanitizer prints where it cannot attach to a GPU, virtual ones for example.
_REFUSALS = ("Device not supported", "not supported on this", "Unable to initialize", "debugger is already attached")


def sanitize(check: str, arguments: Sequence[str], limit_s: float) -> dict[str, Any]:
    """Run `python -m tools.kernel_lab` with arguments under compute-sanitizer's memcheck or racecheck.

    Raises:
        Skip: The sanitizer cannot work with this GPU or driver, or is not done in time. Neither is a clean run.
        RuntimeError: It found something.
    """
    command = [_tool("compute-sanitizer"), "--tool", check, "--error-exitcode", "9"]
    if check == "memcheck":
        # CUDA's own libraries try calls that fail, and handle that.
        command += ["--report-api-errors", "no"]
    done = _run(command, arguments, limit_s, _UNPOOLED)
    said = done.stdout + done.stderr
    if any(refusal in said for refusal in _REFUSALS):
        raise Skip(f"compute-sanitizer refuses this device: {said[-300:]}")
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {said[-2000:]}")
    return {"clean": True}


def profile(arguments: Sequence[str], limit_s: float) -> dict[str, Any]:
    """Run two kernels under Nsight Compute; returns kernel -> metric -> value."""
    names = "|".join(PROFILED)
    # Locking the clocks needs rights that a borrowed machine does not give, and changes the times of what runs beside.
    command = [_tool("ncu"), "--clock-control", "none", "--csv", "--metrics", ",".join(METRICS)]
    command += ["--kernel-name", f"regex:^({names})$"]
    done = _run([*command, "--launch-count", str(len(PROFILED))], arguments, limit_s, {})
    if "ERR_NVGPUCTRPERM" in done.stdout + done.stderr:
        raise Skip("no permission to read the GPU's counters")
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
    return parse_profile(done.stdout)


def parse_profile(text: str) -> dict[str, dict[str, str]]:
    """Read the table that `ncu --csv` prints after what the program and the profiler say."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    found: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(lines):
        if row.get("Metric Name") in METRICS:
            kernel = found.setdefault(row["Kernel Name"].split("(")[0], {})
            kernel[row["Metric Name"]] = f"{row['Metric Value']} {row['Metric Unit']}"
    return found


def _tool(name: str) -> str:
    path = shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
    if path is None:
        raise Skip(f"no {name} here")
    return path


def _run(
    command: Sequence[str], arguments: Sequence[str], limit_s: float, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    whole = [*command, sys.executable, "-m", "tools.kernel_lab", *arguments]
    try:
        return subprocess.run(  # noqa: S603 - a tool of CUDA's on this very program
            whole, capture_output=True, text=True, check=False, timeout=limit_s, env={**os.environ, **environment}
        )
    except subprocess.TimeoutExpired:
        raise Skip(f"not done within {limit_s:.0f} s") from None
