"""What decode steps should take on an H200: an estimate by bytes, instructions and launches, and what was measured.

A step's launches are recorded (`recorded_step`). The bytes of one follow from its arguments; its instructions are
counted by simulating a few of its blocks. It takes as long as the slowest of four: memory, the issue of instructions,
the loads that are on their way at once (bytes in flight per latency), and the tensor cores. A launch costs something
beside. The model leaves out partly filled last waves, the caches, and the joining of shared contexts.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from tools.kernel_lab import ledger
from tools.kernel_lab.benches import GRAPH_BOUND
from tools.kernel_lab.recorded_step import H200, Launch, Operation, record_step
from tools.kernel_lab.shapes import MODELS, Shape
from tools.ptx_simulator import SimulatedLauncher
from tools.ptx_simulator.counters import Counters

CONTEXT = 2048
BATCHES = (1, 32, 256)
# An H200. Bandwidth and tensor cores are what others report to reach; the rest is NVIDIA's or, as it says, a guess.
BANDWIDTH = 4.3e12  # bytes a second
BF16_FLOPS = 790e12
CLOCK_HZ = 1.755e9
ISSUES = 4 * H200.multiprocessors  # warp instructions a clock
REGISTERS, SHARED_BYTES, THREADS, BLOCKS = 65536, 228 * 1024, 2048, 32  # of a multiprocessor
LATENCY_S = 0.8e-6  # of a load under way with many others: a guess
NODE_S = 1.3e-6  # of a graph's launch that begins after the one before: a guess
DEPENDENT_NODE_S = 0.8e-6  # of one that has begun before: a guess
SAMPLE = 8  # blocks simulated of a launch

GROUPS = ("linear layers", "head", "attention", "the rest")
HEAD = ("step", "part", "launches", "MB", "million instructions", "limit", "estimate, µs", "measured, µs")


@attrs.frozen
class Cost:
    """What one launch takes of the device, in seconds by what limits it, beside the launch itself."""

    num_bytes: float
    instructions: float
    memory_s: float
    issue_s: float
    flight_s: float
    flops_s: float

    @property
    def limits(self) -> dict[str, float]:
        return {
            "memory": self.memory_s, "instructions": self.issue_s, "loads in flight": self.flight_s,
            "tensor cores": self.flops_s,
        }  # fmt: skip

    @property
    def limit(self) -> str:
        return max(self.limits, key=lambda name: self.limits[name])

    @property
    def seconds(self) -> float:
        return self.limits[self.limit]


def estimate_launch(launch: Launch) -> Cost:
    """Estimate a launch of one of our kernels."""
    num_bytes, instructions, in_flight = _bytes(launch), _instructions(launch), _in_flight(launch)
    return Cost(
        num_bytes, instructions, num_bytes / BANDWIDTH, instructions / ISSUES / CLOCK_HZ,
        num_bytes * LATENCY_S / in_flight if in_flight else 0.0, 0.0,
    )  # fmt: skip


def estimate_operation(operation: Operation) -> Cost:
    """Estimate one of torch's operations: products by cuBLAS, copies and look-ups."""
    tensors = [*operation.made, *(operation.given if operation.name != "embedding" else operation.made)]
    num_bytes, flops = float(sum(x.nbytes for x in tensors)), 0.0
    if operation.name == "linear":
        x, weight = operation.given[:2]
        flops = 2.0 * x.numel() * len(weight)
    return Cost(num_bytes, 0.0, num_bytes / BANDWIDTH, 0.0, 0.0, flops / BF16_FLOPS)


def _bytes(launch: Launch) -> float:
    """Return what a launch has to move: its arguments, and of the cache what the step's rows see or write."""
    named = _named(launch)
    if launch.kernel.entry == "paged_attention":
        q, k = named["q"], named["k"]
        return 2.0 * q.nbytes + len(named["context"]) * CONTEXT * 2 * k[0].nbytes
    if launch.kernel.entry == "kv_write":
        return 2.0 * named["qkv"].nbytes
    return float(sum(arg.nbytes for arg in launch.args if isinstance(arg, Tensor)))


def _named(launch: Launch) -> dict[str, Any]:
    return {p.name: arg for p, arg in zip(launch.kernel.parameters, launch.args, strict=True)}


def _instructions(launch: Launch) -> float:
    """Count warp instructions: without moves, few of which are left in machine code."""
    counters, blocks = Counters(), math.prod(launch.grid)
    args = [_fill(p.name, arg) for p, arg in zip(launch.kernel.parameters, launch.args, strict=True)]
    SimulatedLauncher(counters=counters, most_blocks=SAMPLE).launch(
        launch.kernel, launch.grid, launch.block, launch.shared_bytes, args
    )
    return (counters.issued.total() - counters.issued["mov"]) * blocks / min(blocks, SAMPLE)


def _fill(name: str, arg: Any) -> Any:
    """Give an argument memory, of which only what is touched will be there; values matter where they are addresses."""
    if not isinstance(arg, Tensor):
        return arg
    if name == "cu_q":
        return torch.arange(len(arg), dtype=arg.dtype)
    if name == "context":
        return torch.full(arg.shape, CONTEXT, dtype=arg.dtype)
    if arg.is_floating_point():
        return torch.empty_strided(arg.shape, arg.stride(), dtype=arg.dtype)
    return torch.zeros(arg.shape, dtype=arg.dtype)


def _in_flight(launch: Launch) -> float | None:
    """Return the bytes that are on their way at once, where the kernel's design says so."""
    macros, threads = dict(launch.kernel.defines), math.prod(launch.block)
    if launch.kernel.entry == "gemv":
        of_block = threads * 8 * 16  # see DEPTH
    elif launch.kernel.entry == "paged_attention":
        tile = 2 * int(macros["BN"]) * int(macros["HEAD_DIM"]) * (1 if macros["KV_8BIT"] else 2)
        of_block = max(1, int(macros["STAGES"]) - 1) * tile
    else:
        return None
    usage = launch.kernel.build("sm_90").usage[launch.kernel.entry]
    registers = -(-usage.registers // 8) * 8 * threads
    resident = min(REGISTERS // registers, SHARED_BYTES // (launch.shared_bytes + 1024), THREADS // threads, BLOCKS)
    return min(math.prod(launch.grid), resident * H200.multiprocessors) * of_block


@attrs.frozen
class Part:
    """A part of a step: what its launches cost, how often each comes, and what launching them takes."""

    costs: Sequence[tuple[Cost, int]]
    launching_s: float

    @property
    def launches(self) -> int:
        return sum(count for _, count in self.costs)

    @property
    def num_bytes(self) -> float:
        return sum(cost.num_bytes * count for cost, count in self.costs)

    @property
    def instructions(self) -> float:
        return sum(cost.instructions * count for cost, count in self.costs)

    @property
    def seconds(self) -> float:
        return self.launching_s + sum(cost.seconds * count for cost, count in self.costs)

    @property
    def limit(self) -> str:
        """What most of the time goes to."""
        shares = defaultdict[str, float](float, {"launches": self.launching_s})
        for cost, count in self.costs:
            shares[cost.limit] += cost.seconds * count
        return max(shares, key=lambda name: shares[name])


def estimate_step(shape: Shape, batch: int) -> dict[str, Part]:
    """Estimate the decode of `batch` rows of CONTEXT tokens each, by part."""
    counts: Counter[Any] = Counter()
    first: dict[Any, Launch | Operation] = {}
    for work in record_step(shape, batch, GRAPH_BOUND).work:
        key = _key(work)
        counts[key] += 1
        first.setdefault(key, work)
    costs: dict[str, list[tuple[Cost, int]]] = defaultdict(list)
    launching: dict[str, float] = defaultdict(float)
    for key, work in first.items():
        group = _group(work, shape)
        if isinstance(work, Launch):
            cost, node_s = estimate_launch(work), DEPENDENT_NODE_S
        else:
            cost, node_s = estimate_operation(work), NODE_S
        costs[group].append((cost, counts[key]))
        launching[group] += node_s * counts[key]
    return {group: Part(costs[group], launching[group]) for group in GROUPS}


def _key(work: Launch | Operation) -> Any:
    if isinstance(work, Launch):
        return work.kernel, work.grid, tuple(arg.shape if isinstance(arg, Tensor) else arg for arg in work.args)
    return work.name, tuple(x.shape for x in work.given)


def _group(work: Launch | Operation, shape: Shape) -> str:
    if isinstance(work, Launch):
        if work.kernel.entry == "paged_attention":
            return "attention"
        weight = _named(work)["weight"] if work.kernel.entry == "gemv" else None
    else:
        weight = work.given[1] if work.name == "linear" else None
    return "the rest" if weight is None else "head" if len(weight) == shape.vocab else "linear layers"


def measured_us() -> dict[str, float]:
    """Return what a GPU was measured to take, by name, of sources that are as they were then."""
    waiting = ledger.unverified()
    entries = [entry for source, entry in ledger.read().items() if source not in waiting]
    return {name: found["us"] for entry in entries for name, found in entry.get("times", {}).items()}


def rows() -> Iterator[tuple[str, ...]]:
    """Yield the table's rows: of each step its parts, then the whole."""
    times = measured_us()
    for model, shape in MODELS.items():
        for batch in BATCHES:
            step = f"{model}, B={batch}"
            parts = estimate_step(shape, batch)
            for group, part in parts.items():
                yield _row(step, group, part, _measured(model, shape, batch, group, times))
            costs = [cost for part in parts.values() for cost in part.costs]
            whole = Part(costs, sum(part.launching_s for part in parts.values()))
            yield _row(step, "whole step", whole, times.get(f"step of {model}, B={batch}"))


def _row(step: str, name: str, part: Part, measured: float | None) -> tuple[str, ...]:
    instructions = f"{part.instructions / 1e6:.1f}" if part.instructions else "-"
    return (
        step, name, str(part.launches), f"{part.num_bytes / 1e6:.0f}", instructions, part.limit,
        f"{part.seconds * 1e6:.0f}", "" if measured is None else f"{measured:.0f}",
    )  # fmt: skip


def _measured(model: str, shape: Shape, batch: int, group: str, times: Mapping[str, float]) -> float | None:
    """Return what the benches of a part's kernels took together; None unless all were measured."""
    names = [name for name, *_ in shape.linears() if (name == "head") == (group == "head")]
    benches = [f"{name} of {model}, {batch} rows" for name in names]
    if group == "attention":
        benches = [f"decode {model} B={batch} {CONTEXT} in a graph"]
    if group == "the rest" or any(name not in times for name in benches):
        return None
    return sum(times[name] for name in benches) * (1 if group == "head" else shape.layers)


def table() -> str:
    """Return the text between the estimate's marks in docs/gpu.md."""
    lines = (HEAD, ("---",) * len(HEAD), *rows())
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
