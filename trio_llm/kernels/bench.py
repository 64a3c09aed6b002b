"""`bench`: how fast is every kernel against this machine's ceilings and beside its peers, and the engine as a whole?"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import click

from trio_llm.kernels import end_to_end, ledger, table, tools
from trio_llm.kernels.benches import Bench, all_benches
from trio_llm.kernels.check import build, by_source, describe, finish
from trio_llm.kernels.device import Call, Device
from trio_llm.kernels.measure import measure
from trio_llm.kernels.phases import Report

PROFILE_S = 60.0


def run(report: Report, device: Device) -> None:
    """Run every phase."""
    environment, ceilings = describe(report, device, ceilings=True)
    benches = list(all_benches(small=device.sim))
    build(report, device, _calls(benches, device))
    kernels = report.run("kernels", _items(benches, device, ceilings), 330)
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


def _calls(benches: list[Bench], device: Device) -> Iterator[Call]:
    """Make one set of buffers after the other, to learn which kernels will run on them."""
    for bench in benches:
        yield bench.make(device.torch_device)[0]
        device.release()


def _items(benches: list[Bench], device: Device, ceilings: dict[str, float]) -> Iterator[tuple[str, Call]]:
    found: dict[str, Any] = {}

    def one(bench: Bench) -> dict[str, Any]:
        try:
            found[bench.name] = measure(bench, device, ceilings, found)
        finally:
            device.release()
        return found[bench.name]

    for bench in benches:
        yield f"{bench.source}: {bench.name}", partial(one, bench)
