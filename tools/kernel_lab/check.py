"""`check`: is every kernel right on this device, twice the same, the same in a graph, and clean under the sanitizer?"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import click
from torch import Tensor

from cuda_kernels import compile as compiling
from cuda_kernels.launch import Kernel
from tools.kernel_lab import ledger, machine, primitives, table, tools
from tools.kernel_lab.cases import Check, all_checks, assert_same_bits, compare, judge, poisoned
from tools.kernel_lab.device import Call, Device, kernels_of, noting
from tools.kernel_lab.phases import Items, Report, run_item
from tools.kernel_lab.specialisations import inspect

SANITIZER_S = 60.0
Results = dict[str, dict[str, Any]]
Tensors = tuple[Tensor, ...]


def run(report: Report, device: Device, *, small: bool) -> None:
    """Run every phase; `small` ones are the comparison alone, which the sanitizer runs."""
    environment, _ = describe(report, device, ceilings=not small)
    made = report.run(
        "problems", [("all", lambda: list(all_checks(device.torch_device, small=small or device.sim)))], 60
    )
    checks: Sequence[Check] = made["all"] if isinstance(made["all"], list) else []
    made["all"] = {"made": len(checks)} if checks else made["all"]
    report.run("compile", compile_items(device, (check.run for check in checks)), 90)
    found = report.run("primitives", primitive_items(device), 30)
    proof = partial(prove, device) if not small else compare
    phases = [found, report.run("correctness", check_items(checks, proof), 270)]
    if not small:
        sanitized = report.run("sanitizer", sanitizer_items(device), 2 * SANITIZER_S)
        if not device.sim and not any("failure" in result for result in sanitized.values()):
            ledger.record_checks({**environment, "sanitizer": sanitized}, by_source(*phases))
    _finish(report, by_source(*phases))


def prove(device: Device, check: Check) -> dict[str, Any]:
    """Compare with float64, run again, and replay from a graph; both must give the same bits."""
    with poisoned():
        first = check.run()
    found = judge(check, first)
    _run_again(device, check, first)
    _replay(device, check, first)
    return found


def noted(action: Call) -> dict[str, Any]:
    """Run an item; its result, or what it raised, with the kernels that it launched."""
    with noting() as launched:
        found = run_item(action)
    return {**found, "kernels": [kernel.specialisation for kernel in launched.kernels]}


def primitive_items(device: Device) -> Items:
    """Return the checks of what kernels are built of."""
    return [(f"primitives.cu: {name}", partial(noted, check)) for name, check in primitives.checks(device)]


def describe(report: Report, device: Device, *, ceilings: bool) -> tuple[dict[str, Any], dict[str, float]]:
    """Run the first two phases of every run: the machine, and the most it can do (NaN where that is not known)."""
    environment = report.run("environment", [("machine", partial(machine.environment, device))], 30)["machine"]
    items = machine.ceilings(device)
    measured = report.run("ceilings", items, 30) if ceilings else {}
    return environment, {
        name: value if isinstance(value := measured.get(name), float) else float("nan") for name, _ in items
    }


def compile_items(device: Device, calls: Iterable[Call]) -> Iterator[tuple[str, Call]]:
    """Compile what calls will launch, in as many processes as there are cores; yield the registers of each."""
    kernels = kernels_of(calls)
    jobs = [(kernel.source, dict(kernel.defines), device.arch) for kernel in kernels]
    complaints = compiling.build_all(jobs, os.cpu_count() or 1)
    for kernel, complaint in zip(kernels, complaints, strict=True):
        yield f"{kernel.source}: {kernel.specialisation}", partial(_usage, kernel, device.arch, complaint)


def _usage(kernel: Kernel, arch: str, complaint: str | None) -> dict[str, Any]:
    if complaint is not None:
        raise compiling.CompileError(complaint)
    made = {one.entry: one for one in inspect(kernel, arch)}[kernel.entry]
    if made.fault:
        raise ArithmeticError(f"{kernel.entry} {made.fault}")
    return {"registers": made.usage.registers if made.usage else None}


def check_items(checks: Sequence[Check], work: Callable[[Check], Any]) -> Items:
    """Return an item per check, which does `work` with it and notes what that launches."""
    return [(f"{check.source}: {check.name}", partial(noted, partial(work, check))) for check in checks]


def _run_again(device: Device, check: Check, first: Tensors) -> None:
    """Compare another run's bits: on a GPU as they come, simulated with another warp first."""
    with device.otherwise():
        assert_same_bits(check, first, check.run(), "two runs differ")


def _replay(device: Device, check: Check, eager: Tensors) -> None:
    """Capture a check's kernel in a CUDA graph; the replay must give what it gave eagerly."""
    captured = device.capture([check.run])
    captured.replay()
    device.synchronize()
    assert_same_bits(check, eager, captured.results[0], "the graph's replay differs")


def sanitizer_items(device: Device) -> Iterator[tuple[str, Call]]:
    """Yield each of the sanitizer's checks, over small problems."""
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
    """Return a line with the sources that no GPU has verified in their current version."""
    return f"not verified on any GPU in their current version: {', '.join(ledger.unverified()) or 'none'}"
