"""`python -m trio_llm.kernels check|bench [--sim]`: are the kernels right, and how fast are they, on this machine."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import click
import torch

from cuda_kernels import compile as compiling
from trio_llm.kernels import bench as benching
from trio_llm.kernels import check as checking
from trio_llm.kernels import table as tables
from trio_llm.kernels.device import Device, Gpu, Simulated
from trio_llm.kernels.phases import Report
from trio_llm.kernels.specialisations import ARCHS, attention, inspect, others


@click.group()
def main() -> None:
    """Check and measure the CUDA kernels."""


def _sim(command: Callable[..., None]) -> Callable[..., None]:
    return click.option("--sim", is_flag=True, help="Simulate the GPU on the CPU; measures nothing.")(command)


def _run(command: Callable[..., None]) -> Callable[..., None]:
    path = click.Path(path_type=Path, dir_okay=False)
    command = click.option("--out", type=path, help="JSON file, written after each phase.")(command)
    return click.option("--budget", default=560.0, help="Seconds for everything.")(_sim(command))


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
    """Measure this machine's ceilings, then every kernel against them and beside its peers, then the whole engine."""
    device, report = _device(sim=sim), Report(out, budget)
    with report.bounded(), device.session():
        benching.run(report, device)


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
                macros = " ".join(f"{name}={value}" for name, value in kernel.defines)
                registers = made.usage.registers if made.usage else "?"
                click.echo(f"{arch} {kernel.source} {made.entry} {macros}: {registers} registers {made.fault or ''}")
                faults += made.fault is not None
    if faults:
        raise SystemExit(1)


@main.command()
def ledger() -> None:
    """Print which kernels no GPU has verified as they are now."""
    click.echo(checking.unverified_line())


@main.command()
@click.option("--write", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="A README with the marks.")
def table(*, write: Path | None) -> None:
    """Print what the README says of speed on a GPU, or put it there."""
    text = tables.readme()
    if write is None:
        click.echo(text)
    else:
        write.write_text(tables.put(text, write.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
