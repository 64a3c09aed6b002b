"""Time a bench and its peers, and compare it with the machine's limits and its target."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

from tools.kernel_lab.benches import Bench, Target
from tools.kernel_lab.cases import error
from tools.kernel_lab.device import Call, Device, interleaved_us, num_buffers, tensors
from tools.kernel_lab.peers import Once, quiet

OURS = "ours"
LIKE_OURS = 0.05  # a peer that differs by more, as a part of the largest value, computes something else


def measure(
    bench: Bench, device: Device, ceilings: Mapping[str, float], earlier: Mapping[str, Any], *, peers: bool = True
) -> dict[str, Any]:
    """Capture ours and, with `peers`, every peer that can be had over rotating buffers, time them in turn.

    Args:
        earlier: Results of benches before, by name, for targets that are set against one.
    Returns:
        us, floor_us, of_floor, spread between passes, target; peers: name -> us, times_faster, difference or failure.
    """
    made = [bench.make(device.torch_device) for _ in range(num_buffers(device, bench.num_bytes))]
    graphs = {OURS: (device.capture([ours for ours, _ in made]), len(made))}
    graphs[OURS][0].replay()
    expected = tensors(made[0][0]())
    beside: dict[str, dict[str, Any]] = {}
    for name in made[0][1] if peers else ():
        try:
            with quiet():
                calls = [makers[name]() for _, makers in (made[:1] if isinstance(made[0][1][name], Once) else made)]
                beside[name] = {"difference": _difference(calls[0], expected), "buffers": len(calls)}
                graphs[name] = (device.capture(calls), len(calls))
        except Exception as reason:  # noqa: BLE001 - a peer that is not to be had is written down
            beside[name] = {"failure": f"{type(reason).__name__}: {reason}"[:300]}
    with quiet():
        times = interleaved_us(device, graphs)
    found = _judge(bench, times.pop(OURS), ceilings)
    for name, passes in times.items():
        us = statistics.mean(passes)
        beside[name] |= {"us": us, "times_faster": us / found["us"]}
    if bench.target:
        found |= against(bench.target, found, {**earlier, **beside})
    return {**found, "peers": beside}


def _difference(call: Call, expected: list[Any]) -> float | None:
    """Return how far a peer is from us; None where it gives something else than we do.

    Raises:
        ArithmeticError: Too far: it does not do the same work.
    """
    theirs = tensors(call())
    if not theirs:
        return None
    worst = max(error(one, ours.double()) for one, ours in zip(theirs, expected, strict=False))
    if not worst <= LIKE_OURS:
        raise ArithmeticError(f"differs from ours by {worst:.2g} of the largest value")
    return worst


def _judge(bench: Bench, passes: list[float], ceilings: Mapping[str, float]) -> dict[str, Any]:
    us, floor_us = statistics.mean(passes), bench.floor_us(ceilings)
    return {
        "us": us, "floor_us": floor_us, "of_floor": floor_us / us, "spread": (max(passes) - min(passes)) / us,
        "tflop_s": bench.flops / us / 1e6,
    }  # fmt: skip


def against(target: Target, found: Mapping[str, float], others: Mapping[str, Any]) -> dict[str, Any]:
    """Say what a target asks for, and whether it was reached; `others` are results by name, of benches and peers."""
    values = {"of floor": found["of_floor"], "us": found["us"], "TFLOP/s": found.get("tflop_s", math.nan)}
    if target.versus is not None:
        values["times"] = others.get(target.versus, {}).get("us", math.nan) / found["us"]
    value = values[target.unit]
    wanted = f"{target.first:g} / {target.good:g} {target.unit}"
    return {"value": value, "target": wanted, "reached": target.reached(value)}
