"""Two replicas on Ray Serve beside one, with and without prefix affinity: requests/s, first token, cached tokens.

    python benchmarks/ray_replicas.py [--requests 96] [--clients 8]

Every request has one of 16 beginnings of some 500 tokens, in random order, and an ending of its own. One replica's
cache holds two thirds of the beginnings. On the cores of one machine two replicas compute no faster than one; what
affinity saves shows in the cached share, and so in the time.
"""

from __future__ import annotations

import argparse
import os
import random
import socket
import statistics
import time
from typing import Any

# Ray's processes inherit it.
os.environ["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] = "trio_llm.ray_serve.prefix_header:middlewares"

import attrs
import ray
import trio
from ray import serve

from trio_llm.cli.client import Api
from trio_llm.ray_serve.app import build

NUM_BEGINNINGS = 16
ENGINE = {"cpu_threads": 1, "num_kv_blocks": 400, "max_batch_size": 8}
KINDS = {
    "one": {"num_replicas": 1},
    "two": {"num_replicas": 2, "prefix_affinity": False},
    "two, affinity": {"num_replicas": 2},
}


@attrs.define
class Seen:
    """What the clients of one kind of deployment saw."""

    first_s: list[float] = attrs.field(factory=list[float])
    prompt_tokens: int = 0
    cached_tokens: int = 0


async def measure(api: Api, num_requests: int, num_clients: int) -> tuple[float, Seen]:
    """Send the requests from so many clients, each of which has one open at a time; return the seconds."""
    dice = random.Random(0)
    numbers = iter([(dice.randrange(NUM_BEGINNINGS), number) for number in range(num_requests)])
    seen = Seen()

    async def client() -> None:
        for beginning, number in numbers:
            prompt = f"Story {beginning}. " + "The little owl went to the market. " * 55 + f"Question {number}"
            await stream(api, {"prompt": prompt, "max_tokens": 16, "temperature": 0, "ignore_eos": True}, seen)

    began_s = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for _ in range(num_clients):
            nursery.start_soon(client)
    return time.perf_counter() - began_s, seen


async def stream(api: Api, body: dict[str, object], seen: Seen) -> None:
    """Stream one request to its end."""
    sent_s, waits = time.perf_counter(), True
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    async with api.open("POST", "/completions", body) as reply:
        while (event := await reply.next_event()) is not None:
            if waits and event.get("choices"):
                seen.first_s.append(time.perf_counter() - sent_s)
                waits = False
            if usage := event.get("usage"):
                seen.prompt_tokens += usage["prompt_tokens"]
                seen.cached_tokens += usage["prompt_tokens_details"]["cached_tokens"]


def main() -> None:
    """Deploy each kind in turn, and print a row of the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--clients", type=int, default=8)
    given = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ray.init(num_cpus=8, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    print("| replicas | requests/s | first token, median | p95 | cached |\n|---|---|---|---|---|")
    for number, (name, arguments) in enumerate(KINDS.items()):
        application = f"bench-{number}"  # With one name for all, the second had the first one's router (Ray 2.60).
        config: dict[str, Any] = {"engine": ENGINE, "server": {"log_level": "warning"}}
        serve.run(build({**arguments, "config": config}), name=application)
        seconds, seen = trio.run(measure, Api(f"http://127.0.0.1:{port}/v1"), given.requests, given.clients)
        p95_s = statistics.quantiles(seen.first_s, n=20)[-1]
        median_ms, p95_ms = statistics.median(seen.first_s) * 1000, p95_s * 1000
        share = seen.cached_tokens / seen.prompt_tokens
        rate = given.requests / seconds
        print(f"| {name} | {rate:.1f} | {median_ms:.0f} ms | {p95_ms:.0f} ms | {share:.0%} |", flush=True)
        serve.delete(application)
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
