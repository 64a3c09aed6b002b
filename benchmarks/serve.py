"""Throughput and latency against the number of clients, for the same total tokens.

Every repetition runs all client counts one after the other, so that a slow minute of the machine hits each of them;
medians over the repetitions are shown with their ranges. The engine's own time is what a step costs outside the model
and the sampler: /metrics tells both sums.

    python benchmarks/serve.py --clients 1 8 32 --requests 64 --repetitions 5
"""

from __future__ import annotations

import argparse
import statistics
import time

import attrs
import trio
from common import (
    Timing,
    fetch,
    machine,
    percentile,
    scrape,
    serving,
    spread,
    stream_completion,
    total,
    wait_until_listening,
)

TOKENS_PER_ANSWER = 64


@attrs.frozen
class Run:
    """One client count, once."""

    seconds: float
    timings: list[Timing]
    steps: float
    own_s: float

    @property
    def tokens_per_s(self) -> float:
        """Output tokens per second over all clients."""
        return sum(timing.tokens for timing in self.timings) / self.seconds


def prompt(number: int) -> str:
    """Write a prompt that shares no first block with any other one."""
    return f"{number} {number} times the little owl went to the market. " + "Once upon a time there was a fox. " * 4


async def measure(port: int, clients: int, requests: int, first_number: int) -> Run:
    """Send the requests from so many clients, each of which has one open at a time."""
    numbers = iter(range(first_number, first_number + requests))
    timings: list[Timing] = []

    async def client() -> None:
        for number in numbers:
            body = {"prompt": prompt(number), "max_tokens": TOKENS_PER_ANSWER, "ignore_eos": True, "temperature": 0}
            timings.append(await stream_completion(port, "/v1/completions", body))

    before = scrape(await fetch(port, "/metrics"))
    started_s = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for _ in range(clients):
            nursery.start_soon(client)
    seconds = time.perf_counter() - started_s
    after = scrape(await fetch(port, "/metrics"))
    steps, engine_s = (
        total(after, name) - total(before, name)
        for name in ("trio_llm:step_own_seconds_count", "trio_llm:step_own_seconds_sum")
    )
    return Run(seconds, timings, steps, engine_s)


async def bench(options: argparse.Namespace) -> dict[int, list[Run]]:
    """Run all repetitions on one server."""
    runs: dict[int, list[Run]] = {clients: [] for clients in options.clients}
    with serving(*options.flags) as server:
        await wait_until_listening(server)
        await measure(server.port, max(options.clients), max(options.clients), 10**6)  # Warm up.
        number = 0
        for _ in range(options.repetitions):
            for clients in options.clients:
                runs[clients].append(await measure(server.port, clients, options.requests, number))
                number += options.requests
    return runs


def table(runs: dict[int, list[Run]]) -> str:
    """Write one line for each client count: medians over the repetitions, ranges in brackets."""
    lines = [
        "| clients | tokens/s | TTFT p50 ms | TTFT p99 ms | ITL p50 ms | ITL p99 ms | tokens/step | engine ms/step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for clients, repetitions in runs.items():
        first_ms = [[1e3 * timing.first_s for timing in run.timings] for run in repetitions]
        gaps_ms = [[1e3 * gap for timing in run.timings for gap in timing.gaps_s] for run in repetitions]
        cells = [
            str(clients),
            spread([run.tokens_per_s for run in repetitions], 0),
            *(spread([percentile(values, share) for values in first_ms], 1) for share in (0.5, 0.99)),
            *(spread([percentile(values, share) for values in gaps_ms], 1) for share in (0.5, 0.99)),
            f"{statistics.median(sum(t.tokens for t in run.timings) / run.steps for run in repetitions):.1f}",
            spread([1e3 * run.own_s / run.steps for run in repetitions], 2),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("flags", nargs="*", help="flags for `trio-llm serve`, after --")
    options = parser.parse_args()
    print(machine())
    print(f"{options.requests} requests of {TOKENS_PER_ANSWER} tokens for each number of clients")
    print(table(trio.run(bench, options)))


if __name__ == "__main__":
    main()
