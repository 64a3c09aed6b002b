"""What a watched engine costs: the same requests with nobody and with one watcher, in turns.

    python benchmarks/watched_page.py
    python benchmarks/watched_page.py --model /models/Qwen2.5-0.5B --streams 64 --rounds 20 --blocks 65536

The watcher is curl, in a process of its own, reading /v1/engine/live as the page does. Requests go to the engine
without HTTP, so that nothing else dilutes the ratio. Wall times are ratios of one round; the first round warms up and
is left out. The CPU time of the event loop's thread, relative to the wall time, is less noisy on a busy machine.
"""

from __future__ import annotations

import argparse
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from statistics import median, quantiles

import trio

from trio_llm.assemble import open_engine
from trio_llm.config import Config, EngineConfig
from trio_llm.engine import Engine
from trio_llm.params import SamplingParams, Submission
from trio_llm.server.app import create_app
from trio_llm.server.http.serve import serve

PROMPTS = ("Once upon a time", "The little owl", "A small fox lived", "There was a brave cat")


async def run(engine: Engine, streams: int, tokens: int) -> tuple[float, float]:
    """Return the seconds of all requests, and those of them that the event loop computed."""

    async def one(at: int) -> None:
        prompt = engine.tokenizer.encode(f"{PROMPTS[at % len(PROMPTS)]} {at}")
        params = SamplingParams(max_tokens=tokens, temperature=0.8, seed=1, ignore_eos=True)
        async with engine.open_stream(Submission(prompt, params)) as stream:
            async for _ in stream:
                pass

    start_s, loop_s = time.perf_counter(), time.thread_time()
    async with trio.open_nursery() as nursery:
        for at in range(streams):
            nursery.start_soon(one, at)
    return time.perf_counter() - start_s, time.thread_time() - loop_s


@asynccontextmanager
async def watched(engine: Engine, url: str) -> AsyncIterator[None]:
    """Watch the engine while the block runs."""
    built = engine.live.num_built
    process = await trio.lowlevel.open_process(["curl", "-sN", f"{url}/v1/engine/live"], stdout=subprocess.DEVNULL)
    while engine.live.num_built == built:  # noqa: ASYNC110 - curl says nothing
        await trio.sleep(0.01)
    yield
    process.kill()
    await process.wait()
    while engine.live.num_watchers:  # noqa: ASYNC110 - as above
        await trio.sleep(0.01)


async def measure(given: argparse.Namespace) -> None:
    """Run the rounds and print ratios."""
    settings = EngineConfig(model=given.model, num_kv_blocks=given.blocks)
    async with open_engine(Config(engine=settings), tune_interpreter=True) as engine, trio.open_nursery() as nursery:
        start = partial(serve, create_app(engine, Config()), host="127.0.0.1", port=0)
        (url,) = await nursery.start(partial(start, shutdown_trigger=trio.sleep_forever))
        ratios: list[float] = []
        shares: list[float] = []
        spent: dict[bool, tuple[float, float]] = {}
        for number in range(given.rounds + 1):
            for watches in (True, False) if number % 2 else (False, True):
                if watches:
                    async with watched(engine, url):
                        spent[True] = await run(engine, given.streams, given.tokens)
                else:
                    spent[False] = await run(engine, given.streams, given.tokens)
            ratios.append(spent[True][0] / spent[False][0])
            shares.append((spent[True][1] - spent[False][1]) / spent[True][0])
        with engine.live.watch():
            began_s = time.perf_counter()
            engine.live.snapshot()
            built_s = time.perf_counter() - began_s
        nursery.cancel_scope.cancel()
    step_ms = 1000 * spent[False][0] / given.tokens
    print(
        f"{given.streams} streams, {given.rounds} rounds, {step_ms:.2f} ms a step, a state in {1000 * built_s:.2f} ms"
    )
    for name, values in (("time with a watcher, relative", ratios[1:]), ("CPU time it adds, share", shares[1:])):
        low, _, high = quantiles(values, n=4)
        print(f"{name}: median {median(values):.4f}, quartiles {low:.4f} to {high:.4f}")


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: the demo model")
    parser.add_argument("--blocks", type=int, help="blocks of the KV cache; default: the engine's")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=12)
    trio.run(measure, parser.parse_args())


if __name__ == "__main__":
    main()
