"""`check`: is every kernel right on this device, twice the same, the same in a graph, and clean under the sanitizer?"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import click

from cuda_kernels import compile as compiling
from cuda_kernels.launch import Kernel
from trio_llm.kernels import ledger, machine, primitives, table, tools
from trio_llm.kernels.cases import Check, all_checks, assert_same_bits, compare
from trio_llm.kernels.device import Call, Device, kernels_of
from trio_llm.kernels.phases import Items, Report
from trio_llm.kernels.specialisations import inspect

SANITIZER_S = 60.0
Results = dict[str, dict[str, Any]]


def run(report: Report, device: Device, *, small: bool) -> None:
    """Run every phase; `small` ones are the comparison alone, which the sanitizer runs."""
    environment, _ = describe(report, device, ceilings=not small)
    made = report.run(
        "problems", [("all", lambda: list(all_checks(device.torch_device, small=small or device.sim)))], 60
    )
    checks: Sequence[Check] = made["all"] if isinstance(made["all"], list) else []
    made["all"] = {"made": len(checks)} if checks else made["all"]
    build(report, device, (check.run for check in checks))
    found = report.run("primitives", ((f"primitives.cu: {n}", do) for n, do in primitives.checks(device)), 30)
    phases = [found, report.run("correctness", _items(checks, compare), 150)]
    if not small:
        phases += [
            report.run("repeatability", _items(checks, partial(_twice, device)), 60),
            report.run("graphs", _items(checks, partial(_replayed, device)), 60),
        ]
        sanitized = report.run("sanitizer", _sanitizer(device), 2 * SANITIZER_S)
        clean = not any("failure" in result for result in sanitized.values())
        if clean and not device.sim:
            ledger.record_checks(environment, by_source(*phases))
    _finish(report, by_source(*phases))


def describe(report: Report, device: Device, *, ceilings: bool) -> tuple[dict[str, Any], dict[str, float]]:
    """Run the first two phases of every run: the machine, and the most it can do (NaN where that is not known)."""
    environment = report.run("environment", [("machine", partial(machine.environment, device))], 30)["machine"]
    items = machine.ceilings(device)
    measured = report.run("ceilings", items, 30) if ceilings else {}
    return environment, {
        name: value if isinstance(value := measured.get(name), float) else float("nan") for name, _ in items
    }


def build(report: Report, device: Device, calls: Iterable[Call]) -> None:
    """Compile what calls will launch, in as many processes as there are cores, and write down its registers."""

    def items() -> Iterator[tuple[str, Call]]:
        kernels = kernels_of(iter(calls))
        jobs = [(kernel.source, dict(kernel.defines), device.arch) for kernel in kernels]
        complaints = compiling.build_all(jobs, os.cpu_count() or 1)
        for kernel, complaint in zip(kernels, complaints, strict=True):
            macros = " ".join(f"{name}={value}" for name, value in kernel.defines)
            yield f"{kernel.source}: {kernel.entry} {macros}", partial(_usage, kernel, device.arch, complaint)

    report.run("compile", items(), 90)


def _usage(kernel: Kernel, arch: str, complaint: str | None) -> dict[str, Any]:
    if complaint is not None:
        raise compiling.CompileError(complaint)
    made = {one.entry: one for one in inspect(kernel, arch)}[kernel.entry]
    if made.fault:
        raise ArithmeticError(f"{kernel.entry} {made.fault}")
    return {"registers": made.usage.registers if made.usage else None}


def _items(checks: Sequence[Check], work: Callable[[Check], Any]) -> Items:
    return ((f"{check.source}: {check.name}", partial(work, check)) for check in checks)


def _twice(device: Device, check: Check) -> dict[str, bool]:
    """Run twice and compare bits: on a GPU as they come, simulated with another warp first."""
    first = check.run()
    with device.otherwise():
        assert_same_bits(check, first, check.run(), "two runs differ")
    return {"equal": True}


def _replayed(device: Device, check: Check) -> dict[str, bool]:
    """Capture a check's kernel in a CUDA graph; the replay must give what it gave eagerly."""
    eager = check.run()
    captured = device.capture([check.run])
    captured.replay()
    device.synchronize()
    assert_same_bits(check, eager, captured.results[0], "the graph's replay differs")
    return {"equal": True}


def _sanitizer(device: Device) -> Iterator[tuple[str, Call]]:
    arguments = ["check", "--small", *(["--sim"] if device.sim else [])]
    for tool in ("memcheck", "racecheck"):
        yield tool, partial(tools.sanitize, tool, arguments, SANITIZER_S)


def by_source(*phases: dict[str, Any]) -> Results:
    """Group results named "source: item" of several phases; of an item in several, the worst outcome counts."""
    grouped: Results = {}
    for results in phases:
        for item, result in results.items():
            source, _, name = item.partition(": ")
            if not isinstance(result, dict):
                continue
            before = grouped.setdefault(source, {}).get(name, {})
            bad = "failure" in before or "skipped" in before
            grouped[source][name] = before if bad else {**before, **result}
    return grouped


def _finish(report: Report, results: Results) -> None:
    registers = [
        f"{item}: {result['registers']} registers"
        for item, result in report.phases["compile"]["results"].items()
        if result.get("registers")
    ]
    for line in registers:
        click.echo(line, err=True)
    for line in table.checks(results):
        click.echo(line)
    finish(report)


def finish(report: Report) -> None:
    """Say how long each phase took, what failed or was left out, and what no GPU has verified.

    Raises:
        SystemExit: Something failed.
    """
    seconds = ", ".join(f"{phase} {found['seconds']:.0f} s" for phase, found in report.phases.items())
    click.echo(f"phases: {seconds}")
    for phase, found in report.phases.items():
        for item, result in found["results"].items():
            if isinstance(result, dict) and (why := result.get("failure") or result.get("skipped")):
                click.echo(f"{phase}: {item}: {'failed' if 'failure' in result else 'skipped'}: {why[:300]}")
    click.echo(unverified_line())
    if report.failed:
        raise SystemExit(1)


def unverified_line() -> str:
    """Say which sources no GPU has run as they are now."""
    return f"not verified on any GPU as they are now: {', '.join(ledger.unverified()) or 'none'}"
