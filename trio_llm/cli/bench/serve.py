"""`trio-llm bench serve`: throughput and latency against the number of clients, for the same total of requests.

Every repetition runs all client counts one after the other, so that a slow minute of the machine hits each of them.
The engine's own time is what a step costs outside model and sampler; it is known where the server exports it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence

import attrs
from tqdm import tqdm

from trio_llm.cli.bench.child import BenchmarkError, serving
from trio_llm.cli.bench.report import Figure, Row, percentile
from trio_llm.cli.client import Api, ApiError
from trio_llm.engine.nursery import open_nursery

_WARM_UP_NUMBER = 10**6


@attrs.frozen
class Load:
    """What is asked of the server."""

    clients: tuple[int, ...]
    num_requests: int
    repetitions: int
    max_tokens: int
    prompt_words: int

    def prompt(self, number: int) -> str:
        """Write a prompt whose very beginning no other one shares, so that no prefix cache helps."""
        words = f"{number} {number} times the little owl went to the market. ".split()
        return " ".join((words * (self.prompt_words // len(words) + 1))[: max(2, self.prompt_words)])


@attrs.frozen
class Timing:
    """One streamed request: when it was sent, when each event with text arrived, and how many tokens it made."""

    sent_s: float
    events_s: tuple[float, ...]
    num_tokens: int

    @property
    def first_s(self) -> float:
        return self.events_s[0] - self.sent_s

    @property
    def gaps_s(self) -> list[float]:
        return [after - before for before, after in zip(self.events_s, self.events_s[1:], strict=False)]


@attrs.frozen
class Run:
    """One client count, once. `steps` and `own_s` are None where the server does not tell."""

    seconds: float
    timings: tuple[Timing, ...]
    steps: float | None
    own_s: float | None


async def stream(api: Api, path: str, body: dict[str, object]) -> Timing:
    """Stream one request to its end.

    Raises:
        ApiError: It was refused or broke off.
        BenchmarkError: It had no text.
    """
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    sent_s = time.perf_counter()
    events_s: list[float] = []
    num_tokens = 0
    async with api.open("POST", path, body) as reply:
        while (event := await reply.next_event()) is not None:
            if event.get("choices"):
                events_s.append(time.perf_counter())
            num_tokens = (event.get("usage") or {}).get("completion_tokens", num_tokens)
    if not events_s:
        raise BenchmarkError("a request got no text")
    return Timing(sent_s, tuple(events_s), num_tokens or len(events_s))


async def bench_own_server(flags: Sequence[str], load: Load, model: str | None, *, progress: bool = False) -> list[Row]:
    """Start a server with these flags and run all repetitions against it."""
    with serving(flags) as child:
        await child.listening()
        return await bench_server(child.api, load, model, progress=progress)


async def bench_server(api: Api, load: Load, model: str | None, *, progress: bool = False) -> list[Row]:
    """Run all repetitions against a server that is there, and show on stderr how many requests are answered."""
    model = model or (await api.models())[0]
    total = load.num_requests * (1 + len(load.clients) * load.repetitions)
    with tqdm(total=total, desc="Requests", unit="request", dynamic_ncols=True, disable=not progress) as bar:
        return await _bench(api, load, model, bar.update)


async def _bench(api: Api, load: Load, model: str, done: Callable[[], object]) -> list[Row]:
    await _measure(api, load, model, max(load.clients), _WARM_UP_NUMBER, done)
    runs: dict[int, list[Run]] = {clients: [] for clients in load.clients}
    first_number = 0
    for _ in range(load.repetitions):
        for clients in load.clients:
            runs[clients].append(await _measure(api, load, model, clients, first_number, done))
            first_number += load.num_requests
    return [({"clients": clients}, _figures(repetitions)) for clients, repetitions in runs.items()]


async def _measure(
    api: Api, load: Load, model: str, clients: int, first_number: int, done: Callable[[], object]
) -> Run:
    """Send the requests from so many clients, each of which has one open at a time."""
    numbers = iter(range(first_number, first_number + load.num_requests))
    timings: list[Timing] = []

    async def client() -> None:
        for number in numbers:
            body = {
                "model": model,
                "prompt": load.prompt(number),
                "max_tokens": load.max_tokens,
                "temperature": 0,
                "ignore_eos": True,
            }
            timings.append(await stream(api, "/completions", body))
            done()

    before = await _own_time(api)
    started_s = time.perf_counter()
    async with open_nursery() as nursery:
        for _ in range(clients):
            nursery.start_soon(client)
    seconds = time.perf_counter() - started_s
    after = await _own_time(api)
    if before is None or after is None:
        return Run(seconds, tuple(timings), None, None)
    return Run(seconds, tuple(timings), after[0] - before[0], after[1] - before[1])


async def _own_time(api: Api) -> tuple[float, float] | None:
    """Return the steps so far and the engine's own seconds in them."""
    try:
        page = await api.metrics()
    except ApiError:
        return None
    steps, seconds = (
        re.findall(rf"^trio_llm:step_own_seconds_{part}\{{.*\}} (\S+)$", page, re.MULTILINE)
        for part in ("count", "sum")
    )
    return (sum(map(float, steps)), sum(map(float, seconds))) if steps else None


def _figures(runs: Sequence[Run]) -> list[Figure]:
    def quantiles(name: str, share: float, values: Callable[[Timing], list[float]]) -> Figure:
        each = [[1e3 * value for timing in run.timings for value in values(timing)] or [0.0] for run in runs]
        return Figure(name, "ms", tuple(percentile(one, share) for one in each))

    tokens = [sum(timing.num_tokens for timing in run.timings) for run in runs]
    figures = [
        Figure("throughput", "tokens/s", tuple(n / run.seconds for n, run in zip(tokens, runs, strict=True)), 0),
        quantiles("TTFT p50", 0.5, lambda timing: [timing.first_s]),
        quantiles("TTFT p99", 0.99, lambda timing: [timing.first_s]),
        quantiles("ITL p50", 0.5, lambda timing: timing.gaps_s),
        quantiles("ITL p99", 0.99, lambda timing: timing.gaps_s),
    ]
    if all(run.steps and run.own_s is not None for run in runs):
        per_step = [
            (n / (run.steps or 1), 1e3 * (run.own_s or 0) / (run.steps or 1))
            for n, run in zip(tokens, runs, strict=True)
        ]
        figures += [
            Figure("batch", "tokens/step", tuple(batch for batch, _ in per_step)),
            Figure("engine", "ms/step", tuple(own for _, own in per_step), 2),
        ]
    return figures
