"""`python -m tools.kernel_lab check|bench [--sim]`: are the kernels right, and how fast are they, on this machine."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import click
import torch

from cuda_kernels import compile as compiling
from tools.kernel_lab import bench as benching
from tools.kernel_lab import check as checking
from tools.kernel_lab import estimate as estimating
from tools.kernel_lab import run_all as running
from tools.kernel_lab import table as tables
from tools.kernel_lab import worker
from tools.kernel_lab.device import Device, Gpu, Simulated
from tools.kernel_lab.parts import OTHERS, SOURCES
from tools.kernel_lab.phases import Report
from tools.kernel_lab.specialisations import ARCHS, attention, inspect, others

PARTS = (*OTHERS, *SOURCES)


@click.group()
def main() -> None:
    """Check and measure the CUDA kernels."""


def _sim(command: Callable[..., None]) -> Callable[..., None]:
    return click.option("--sim", is_flag=True, help="Simulate the GPU on the CPU; measures nothing.")(command)


def _run(command: Callable[..., None]) -> Callable[..., None]:
    path = click.Path(path_type=Path, dir_okay=False)
    command = click.option("--out", type=path, help="JSON file, written after each phase.")(command)
    return click.option("--budget", default=560.0, help="Seconds for everything.")(_sim(command))


def _write(command: Callable[..., None]) -> Callable[..., None]:
    path = click.Path(path_type=Path, exists=True, dir_okay=False)
    return click.option("--write", type=path, help="A page with the marks.")(command)


def _device(*, sim: bool) -> Device:
    if not sim and not torch.cuda.is_available():
        raise click.ClickException("there is no GPU here; --sim simulates one")
    return Simulated() if sim else Gpu()


@main.command()
@_run
@click.option("--small", is_flag=True, help="Small sizes only, and only the comparison (what the sanitizer runs).")
def check(*, sim: bool, out: Path | None, budget: float, small: bool) -> None:
    """Compare every kernel with float64, twice and in a graph; on a GPU, write down what was verified."""
    device, report = _device(sim=sim), Report(out, budget)
    with report.bounded(), device.session():
        checking.run(report, device, small=small)


@main.command()
@_run
def bench(*, sim: bool, out: Path | None, budget: float) -> None:
    """Measure this machine's limits, then every kernel against them and its peers, then the whole engine."""
    device, report = _device(sim=sim), Report(out, budget)
    with report.bounded(), device.session():
        benching.run(report, device)


@main.command("all")
@_sim
@click.option("--budget", default=480.0, show_default=True, help="Seconds for everything.")
@click.option(
    "--item-limit", default=45.0, show_default=True, help="Seconds an item may take before its part is ended."
)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder for the results.")
@click.option("--only", multiple=True, type=click.Choice(PARTS), help="Leave the other parts out.")
@click.option("--rehearse", multiple=True, type=(click.Choice(PARTS), click.Choice(["fault", "hang"])),
              help="Let a part's first launch go wrong.")  # fmt: skip
def everything(
    *,
    sim: bool,
    budget: float,
    item_limit: float,
    out: Path,
    only: tuple[str, ...],
    rehearse: tuple[tuple[str, str], ...],
) -> None:
    """Check, measure and compare everything, a process per source, in the order of what tells most."""
    if not running.run(out, budget, item_limit, sim=sim, only=only, troubles=dict(rehearse)):
        raise SystemExit(1)


@main.command(hidden=True)
@click.argument("name", type=click.Choice(PARTS))
@_sim
@click.option("--trouble", type=click.Choice(["fault", "hang"]))
def part(*, name: str, sim: bool, trouble: worker.Trouble | None) -> None:
    """Be one of the processes of `all`."""
    raise SystemExit(worker.main(name, _device(sim=sim), trouble))


@main.command()
@_sim
def once(*, sim: bool) -> None:
    """Run two kernels once each: what a profiler looks at."""
    device = _device(sim=sim)
    with device.session():
        benching.once(device)


@main.command("compile")
@click.option("--arch", "archs", multiple=True, default=ARCHS, show_default=True, help="For example sm_90.")
def compile_all(archs: tuple[str, ...]) -> None:
    """Compile every specialisation; print its registers, and fail where one spills or lacks an instruction."""
    faults = 0
    for arch in archs:
        kernels = [*attention(arch), *others()]
        compiling.build_all([(k.source, dict(k.defines), arch) for k in kernels], os.cpu_count() or 1)
        for kernel in kernels:
            for made in inspect(kernel, arch):
                registers = made.usage.registers if made.usage else "?"
                click.echo(
                    f"{arch} {kernel.source} {made.entry} {kernel.macros}: {registers} registers {made.fault or ''}"
                )
                faults += made.fault is not None
    if faults:
        raise SystemExit(1)


@main.command()
def ledger() -> None:
    """Print the kernels that no GPU has verified in their current version."""
    click.echo(checking.unverified_line())


@main.command()
@_write
def table(*, write: Path | None) -> None:
    """Print what docs/benchmarks.md says of speed on a GPU, or write it there."""
    _print_or_write(tables.measured(), write, "kernels")


@main.command()
@_write
def estimate(*, write: Path | None) -> None:
    """Print what docs/gpu.md estimates of steps on an H200, or write it there."""
    _print_or_write(estimating.table(), write, "estimate")


def _print_or_write(text: str, page: Path | None, name: str) -> None:
    if page is None:
        click.echo(text)
    else:
        page.write_text(tables.put(text, page.read_text(encoding="utf-8"), name), encoding="utf-8")


if __name__ == "__main__":
    main()
