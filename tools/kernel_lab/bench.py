"""`bench`: measures every kernel against this machine's limits and its peers, and the whole engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import click

from tools.kernel_lab import ledger, table, tools
from tools.kernel_lab.benches import Bench, all_benches
from tools.kernel_lab.check import by_source, compile_items, describe, finish
from tools.kernel_lab.device import Call, Device
from tools.kernel_lab.measure import measure
from tools.kernel_lab.phases import Report

PROFILE_S = 60.0


def run(report: Report, device: Device) -> None:
    """Run every phase."""
    from tools.kernel_lab import end_to_end  # the engine needs Trio, which a machine that checks kernels may lack

    environment, ceilings = describe(report, device, ceilings=True)
    benches = list(all_benches(small=device.sim))
    report.run("compile", compile_items(device, calls_of(benches, device)), 90)
    kernels = report.run("kernels", bench_items(benches, device, ceilings), 330)
    once = ["once", *(["--sim"] if device.sim else [])]
    report.run("profile", [("ncu", lambda: tools.profile(once, PROFILE_S))], PROFILE_S)
    engine = report.run("end to end", end_to_end.items(device, ceilings), 110)
    grouped = by_source(kernels)
    if not device.sim:
        ledger.record_times(environment, grouped, engine)
    for name, value in ceilings.items():
        click.echo(f"{name} {value:.4g}")
    for line in table.times(grouped, engine):
        click.echo(line)
    finish(report)


def once(device: Device) -> None:
    """Run a decode and a product with weights once each: what a profiler looks at."""
    benches = {bench.source: bench for bench in reversed(list(all_benches(small=device.sim)))}
    for source in ("paged_attn.cu", "gemv.cu"):
        benches[source].make(device.torch_device)[0]()
    device.synchronize()


def calls_of(benches: list[Bench], device: Device) -> Iterator[Call]:
    """Make one set of buffers after the other, to learn which kernels will run on them."""
    for bench in benches:
        yield bench.make(device.torch_device)[0]
        device.release()


def bench_items(
    benches: list[Bench], device: Device, ceilings: Mapping[str, float], *, peers: bool = True
) -> list[tuple[str, Call]]:
    """Return an item per bench: its times and, with `peers`, theirs."""
    found: dict[str, Any] = {}

    def one(bench: Bench) -> dict[str, Any]:
        try:
            found[bench.name] = measure(bench, device, ceilings, found, peers=peers)
        finally:
            device.release()
        return found[bench.name]

    return [(f"{bench.source}: {bench.name}", partial(one, bench)) for bench in benches]
