"""Where checks and benches run: a GPU, or the simulator, on which the same code runs and measures nothing."""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from cuda_kernels import compile as compiling
from cuda_kernels.launch import CupyLauncher, Dim3, Kernel, Launcher, launcher, using
from tools.ptx_simulator import SimulatedLauncher
from tools.ptx_simulator.machine import ORDERS

Call = Callable[[], Any]
REPLAYS = 20  # of which the median counts
PASSES = 2
L2_TIMES = 3  # size of the rotating buffers, in multiples of the second-level cache
MAX_BUFFERS = 512
READ_BEFORE_BYTES = 1 << 29


def tensors(results: Any) -> list[Tensor]:
    """Return the tensors among what a call gave."""
    return [x for x in (results if isinstance(results, tuple) else (results,)) if isinstance(x, Tensor)]


@attrs.frozen
class Captured:
    """Calls in a CUDA graph: `replay` does them again, into the same `results`."""

    replay: Callable[[], None]
    results: list[Any]


class Gpu:
    """The current CUDA device."""

    sim = False
    torch_device = torch.device("cuda")

    @property
    def arch(self) -> str:
        return compiling.target(torch.cuda.get_device_capability())

    @property
    def cache_bytes(self) -> int:
        return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size

    def session(self) -> contextlib.AbstractContextManager[None]:
        """Launch kernels here inside the block."""
        return contextlib.nullcontext()

    def otherwise(self) -> contextlib.AbstractContextManager[None]:
        """Run again as differently as this device can: here, as it comes."""
        return contextlib.nullcontext()

    def waiting(self) -> contextlib.AbstractContextManager[None]:
        """Let every kernel of a graph begin after the one before it inside the block."""
        return using(CupyLauncher(overlap=False))

    def capture(self, calls: Sequence[Call]) -> Captured:
        """Put calls into one graph, after having done each once: that compiles, loads modules and fills caches."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            results = [call() for call in calls]
        torch.cuda.synchronize()
        return Captured(graph.replay, results)

    @functools.cached_property
    def _other_data(self) -> Tensor:
        return torch.zeros(READ_BEFORE_BYTES // 4, device=self.torch_device)

    def time_us(self, work: Callable[[], None]) -> float:
        """Return how long the device takes for some work.

        Before it the device reads other data for a tenth of a millisecond: the caches hold nothing of the work's, and
        it is queued whole when it begins, so that the host's part of a launch is not measured.
        """
        self._other_data.sum()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1000

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def is_lost(self) -> bool:
        """Return whether a fault makes every further call of this process fail."""
        try:
            torch.cuda.synchronize()
        except Exception:  # noqa: BLE001 - whatever it is, a healthy device can be waited for
            return True
        return False

    def release(self) -> None:
        """Give memory back that torch keeps."""
        torch.cuda.empty_cache()


class Simulated:
    """The simulator over CPU tensors; every time is NaN."""

    sim = True
    torch_device = torch.device("cpu")
    arch = "compute_90"
    cache_bytes = 0

    def session(self) -> contextlib.AbstractContextManager[None]:
        return using(SimulatedLauncher(self.arch))

    def otherwise(self) -> contextlib.AbstractContextManager[None]:
        """With the last warp first."""
        return using(SimulatedLauncher(self.arch, order=ORDERS[-1]))

    def waiting(self) -> contextlib.AbstractContextManager[None]:
        """Run on: no two kernels are simulated at once."""
        return contextlib.nullcontext()

    def capture(self, calls: Sequence[Call]) -> Captured:
        """Stand in for a graph: results are empty until they are replayed."""
        results = [call() for call in calls]
        for kept in results:
            for x in tensors(kept):
                x.zero_()

        def replay() -> None:
            for call, kept in zip(calls, results, strict=True):
                for into, new in zip(tensors(kept), tensors(call()), strict=True):
                    into.copy_(new)

        return Captured(replay, results)

    def time_us(self, work: Callable[[], None]) -> float:
        work()
        return math.nan

    def synchronize(self) -> None:
        pass

    def is_lost(self) -> bool:
        return False

    def release(self) -> None:
        pass


Device = Gpu | Simulated


class Collector:
    """A launcher that remembers which kernels it was asked for.

    Attributes:
        inner: Runs them; None runs nothing.
        kernels: Each kernel and how often it was launched.
    """

    def __init__(self, inner: Launcher | None = None) -> None:
        self.inner = inner
        self.kernels: Counter[Kernel] = Counter()

    def launch(self, kernel: Kernel, grid: Dim3, block: Dim3, shared_bytes: int, args: Sequence[Any]) -> None:
        self.kernels[kernel] += 1
        if self.inner is not None:
            self.inner.launch(kernel, grid, block, shared_bytes, args)


@contextlib.contextmanager
def noting() -> Generator[Collector]:
    """Note the kernels that are launched in the block."""
    collector = Collector(launcher())
    with using(collector):
        yield collector


def kernels_of(calls: Iterable[Call]) -> list[Kernel]:
    """Return the kernels that calls would launch, so that they can be compiled at once."""
    collector = Collector()
    with using(collector):
        for call in calls:
            call()
    return list(collector.kernels)


def num_buffers(device: Device, bytes_each: int) -> int:
    """Return how many copies of a working set push each other out of the cache."""
    return max(1, min(MAX_BUFFERS, -(-L2_TIMES * device.cache_bytes // max(bytes_each, 1))))


def interleaved_us(device: Device, graphs: Mapping[str, tuple[Captured, int]]) -> dict[str, list[float]]:
    """Time graphs of several calls in turn, forward and back, so that a drift of the clocks affects all equally.

    Returns:
        Name -> microseconds of one call, once per pass.
    """
    times: dict[str, list[float]] = {name: [] for name in graphs}
    replays = 1 if device.sim else REPLAYS // 2  # each name comes twice in a pass
    for _ in range(PASSES):
        found: dict[str, list[float]] = {name: [] for name in graphs}
        for name in [*graphs, *reversed(list(graphs))]:
            graph, calls = graphs[name]
            found[name] += [device.time_us(graph.replay) / calls for _ in range(replays)]
        for name, values in found.items():
            times[name].append(statistics.median(values))
    return times
