"""`python -m trio_llm.kernels check|bench [--sim]`: are the kernels right, and how fast are they, on this machine."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import torch

from cuda_kernels.compile import compiler_version
from cuda_kernels.launch import using
from cuda_kernels.simulator import SimulatedLauncher
from cuda_kernels.simulator.machine import ORDERS
from trio_llm.kernels import ledger, timing
from trio_llm.kernels.benches import Bench, all_benches
from trio_llm.kernels.cases import Check, all_checks, compare
from trio_llm.kernels.phases import Report

GPU_SCALE = 16  # sizes of checks, beside those that are simulated
Items = Iterator[tuple[str, Callable[[], Any]]]


def _environment(*, sim: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"compiler": compiler_version(), "torch": torch.__version__}
    if sim:
        return {**found, "gpu": "simulated"}
    driver = "unknown"
    if smi := shutil.which("nvidia-smi"):
        query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()  # noqa: S603
    return {**found, "gpu": torch.cuda.get_device_name(), "driver": driver}


def _check_items(checks: list[Check]) -> Items:
    for check in checks:
        yield f"{check.source}: {check.name}", lambda c=check: compare(c)


def _again_items(checks: list[Check], *, sim: bool) -> Items:
    """Run twice and compare bits: on a GPU as they come, simulated with another warp first."""

    def twice(check: Check) -> dict[str, bool]:
        first = check.run()
        launcher = using(SimulatedLauncher(order=ORDERS[-1])) if sim else contextlib.nullcontext()
        with launcher:
            second = check.run()
        for one, other in zip(first, second, strict=True):
            if not torch.equal(one.view(torch.uint8), other.view(torch.uint8)):
                raise ArithmeticError(f"{check.source}, {check.name}: two runs differ")
        return {"equal": True}

    for check in checks:
        yield f"{check.source}: {check.name}", lambda c=check: twice(c)


def _replay(check: Check) -> dict[str, bool]:
    """Capture a check's kernel in a CUDA graph; the replay must give what it gave eagerly."""
    eager = check.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        captured = check.run()
    graph.replay()
    torch.cuda.synchronize()
    for one, other in zip(eager, captured, strict=True):
        if not torch.equal(one.view(torch.uint8), other.view(torch.uint8)):
            raise ArithmeticError(f"{check.source}, {check.name}: the graph's replay differs")
    return {"equal": True}


def _sanitize() -> dict[str, Any]:
    """Run the small checks under compute-sanitizer, in a process of its own."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"skipped": "no compute-sanitizer"}
    command = [tool, "--error-exitcode", "9", sys.executable, "-m", "trio_llm.kernels", "check", "--small"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)  # noqa: S603
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:])
    return {"clean": True}


def _measure(bench: Bench, ceilings: dict[str, float] | None) -> dict[str, Any]:
    """Time one bench beside its peers; simulated (without ceilings), only run it once."""
    if ceilings is None:
        ours, peers = bench.make(torch.device("cpu"))
        for work in (ours, *peers.values()):
            work()
        return {"ran": ["ours", *peers]}
    made = [bench.make(torch.device("cuda")) for _ in range(timing.num_buffers(max(bench.num_bytes, 1)))]
    ours = [work for work, _ in made]
    floor_us = max(bench.num_bytes / ceilings["copy_gb_s"] / 1e3, bench.flops / ceilings["bf16_tflop_s"] / 1e6)
    ours_us = timing.graph_us(ours)
    found: dict[str, Any] = {"us": ours_us, "floor_us": floor_us, "of_floor": floor_us / ours_us, "peers": {}}
    for name in made[0][1]:
        mine, theirs = timing.interleaved_us(ours, [peers[name] for _, peers in made])
        found["peers"][name] = {"us": theirs, "ours_us": mine, "times_faster": theirs / mine}
    return found


def _by_source(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    grouped: dict[str, dict[str, Any]] = {}
    for item, result in results.items():
        source, _, name = item.partition(": ")
        grouped.setdefault(source, {})[name] = result
    return grouped


def _finish(report: Report) -> None:
    for phase, found in report.phases.items():
        click.echo(f"{phase} ({found['seconds']} s)")
        for item, result in found["results"].items():
            shown = {k: v for k, v in result.items() if k != "trace"} if isinstance(result, dict) else result
            click.echo(f"  {item}: {shown}")
    waiting = ledger.unverified()
    click.echo(f"not verified on any GPU as they are now: {', '.join(waiting) or 'none'}")
    if report.failed:
        raise SystemExit(1)


@click.group()
def main() -> None:
    """Check and measure the CUDA kernels."""


def _common(command: Callable[..., None]) -> Callable[..., None]:
    command = click.option("--sim", is_flag=True, help="Simulate the GPU on the CPU; measures nothing.")(command)
    path = click.Path(path_type=Path, dir_okay=False)
    command = click.option("--out", type=path, help="JSON file, written after each phase.")(command)
    return click.option("--budget", default=570.0, help="Seconds for everything.")(command)


@main.command()
@_common
@click.option("--small", is_flag=True, help="Small sizes only, and only the comparison (what the sanitizer runs).")
def check(*, sim: bool, out: Path | None, budget: float, small: bool) -> None:
    """Compare every kernel with float64, twice and in a graph; on a GPU, write down what was verified."""
    report = Report(out, budget)
    with using(SimulatedLauncher()) if sim else contextlib.nullcontext():
        environment = report.run("environment", [("machine", lambda: _environment(sim=sim))], 20)["machine"]
        device = torch.device("cpu" if sim else "cuda")
        checks = list(all_checks(device, scale=1 if sim or small else GPU_SCALE))
        results = report.run("correctness", _check_items(checks), 150)
        if not small:
            report.run("repeatability", _again_items(checks, sim=sim), 60)
            if not sim:
                replays = ((f"{c.source}: {c.name}", lambda c=c: _replay(c)) for c in checks)
                report.run("graphs", replays, 60)
                report.run("sanitizer", [("memcheck", _sanitize)], 130)
                if not report.failed:
                    ledger.record(environment, _by_source(results))
    _finish(report)


@main.command()
@_common
def bench(*, sim: bool, out: Path | None, budget: float) -> None:
    """Measure this machine's ceilings, then every kernel against them and beside its peers."""
    report = Report(out, budget)
    with using(SimulatedLauncher()) if sim else contextlib.nullcontext():
        report.run("environment", [("machine", lambda: _environment(sim=sim))], 20)
        ceilings = None
        if not sim:
            ceilings = report.run("ceilings", [("measured", timing.ceilings)], 60)["measured"]
            if "failure" in ceilings:
                _finish(report)
                return
        items = ((f"{b.source}: {b.name}", lambda b=b: _measure(b, ceilings)) for b in all_benches(small=sim))
        report.run("kernels", items, 480)
    _finish(report)


if __name__ == "__main__":
    main()
