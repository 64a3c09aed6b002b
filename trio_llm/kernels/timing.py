"""Time work on a GPU: CUDA graphs of calls over rotating buffers, replayed and timed by events."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

REPLAYS = 20
L2_TIMES = 3  # rotating buffers are so many times the second-level cache


def graph_us(calls: Sequence[Callable[[], object]]) -> float:
    """Capture all calls in one graph; return the median time of one call, in microseconds."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()  # compiles, loads modules and allocates before capture
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for call in calls:
                call()
        times: list[float] = []
        for _ in range(REPLAYS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1000 / len(calls))
    return statistics.median(times)


def interleaved_us(ours: Sequence[Callable[[], object]], peer: Sequence[Callable[[], object]]) -> tuple[float, float]:
    """Time ours, peer, peer, ours, so that a drift of the clocks hits both; return the mean of each pair."""
    first, peer_first, peer_second, second = (graph_us(calls) for calls in (ours, peer, peer, ours))
    return (first + second) / 2, (peer_first + peer_second) / 2


def num_buffers(bytes_each: int) -> int:
    """Return how many copies of a working set push each other out of the cache."""
    cache_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return max(1, min(64, -(-L2_TIMES * cache_bytes // bytes_each)))


def ceilings() -> dict[str, float]:
    """Measure this machine: read-and-write bandwidth, bfloat16 arithmetic, and what a launch costs."""
    source = torch.empty(1 << 29, dtype=torch.int16, device="cuda")
    target = torch.empty_like(source)
    copy_us = graph_us([lambda: target.copy_(source)])
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    matmul_us = graph_us([lambda: torch.mm(a, b, out=out)])
    small = torch.zeros(8, device="cuda")
    node_us = graph_us([lambda: small.add_(1)] * 200)
    return {
        "copy_gb_s": 2 * source.nbytes / copy_us / 1000,
        "bf16_tflop_s": 2 * 8192**3 / matmul_us / 1e6,
        "graph_node_us": node_us,
    }
