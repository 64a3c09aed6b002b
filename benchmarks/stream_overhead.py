"""What everything outside the model costs: `python benchmarks/stream_overhead.py [--model DIR]`.

Starts a server, and streams completions from it with a load generator of its own process on the same machine:

- CPU time of the event loop per server-sent event, from the kernel's clock of the server's main thread;
- tokens a second, and events a token: a client that is behind gets several tokens in one event;
- milliseconds a step outside the model (`trio_llm:step_own_seconds`) and in it;
- with `--idle`, the CPU time of the whole server while nothing runs.

Then the engine alone in this process, without HTTP: milliseconds a step at one row, and outside the model. The streams
run for a fixed number of tokens. Figures are medians of the rounds with their range. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import selectors
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import trio

from trio_llm import Config, SamplingParams, open_engine
from trio_llm.config import EngineConfig
from trio_llm.demo import demo_model_path
from trio_llm.engine import Engine
from trio_llm.params import Submission

STARTUP_S = 180.0
PROMPT_TOKENS = 64  # at most
TIMES = ("own", "model")  # trio_llm:step_..._seconds


@attrs.frozen
class Server:
    """A server of the model; its event loop runs on its main thread."""

    pid: int
    port: int

    def loop_s(self) -> float:
        """Return the CPU time of the event loop's thread so far."""
        return int(Path(f"/proc/{self.pid}/task/{self.pid}/schedstat").read_text().split()[0]) / 1e9

    def cpu_s(self) -> float:
        """Return the CPU time of all threads so far, of those too that have ended."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def steps(self) -> dict[str, tuple[float, float]]:
        """Return for each of TIMES the seconds and the number of the steps so far."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics") as response:
            text = response.read().decode()
        found: dict[str, tuple[float, float]] = {}
        for name in TIMES:
            total, num = (
                float(re.search(rf"^trio_llm:step_{name}_seconds_{end}{{.*}} (.*)$", text, re.M)[1])  # pyright: ignore[reportOptionalSubscript]
                for end in ("sum", "count")
            )
            found[name] = total, num
        return found


def blocks(streams: int, tokens: int) -> int:
    """Return how many KV blocks hold the streams."""
    return 1 + streams * -(-(PROMPT_TOKENS + tokens) // 16)


@contextlib.contextmanager
def served(model: str, streams: int, tokens: int) -> Iterator[Server]:
    """Run a server with room for `streams` of `tokens` each at once."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "trio_llm", "serve", model, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--log-level", "warning", "--max-batch-size", str(streams), "--kv-blocks", str(blocks(streams, tokens))]
    process = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + STARTUP_S
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                break
            if time.monotonic() > deadline or process.poll() is not None:
                sys.exit("the server does not start")
            time.sleep(0.2)
        yield Server(process.pid, port)
    finally:
        process.terminate()
        process.wait(30)


def stream(server: Server, streams: int, body: dict[str, Any]) -> dict[str, float]:
    """Stream `streams` requests at once; measure while all of them run."""
    data = json.dumps(body).encode()
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    request = f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data
    selector = selectors.DefaultSelector()
    for _ in range(streams):
        connection = socket.create_connection(("127.0.0.1", server.port))
        connection.sendall(request)
        selector.register(connection, selectors.EVENT_READ)
    before, waiting, events = server.steps(), set(selector.get_map()), 0
    began: tuple[float, float, int] | None = None
    ended: tuple[float, float, int] | None = None
    while selector.get_map():
        for key, _ in selector.select():
            connection: Any = key.fileobj
            part = connection.recv(1 << 16)
            num = part.count(b"data: ")
            events += num
            if num:
                waiting.discard(key.fd)
            if not waiting and began is None:
                began = time.perf_counter(), server.loop_s(), events
            if not part or b"[DONE]" in part:
                ended = ended or (time.perf_counter(), server.loop_s(), events)
                selector.unregister(connection)
                connection.close()
    if began is None or ended is None:
        sys.exit(f"{streams} streams never ran at once: raise --tokens")
    seconds, loop_s, measured = (late - early for late, early in zip(ended, began, strict=True))
    events_per_token = (events - streams) / (streams * body["max_tokens"])  # [DONE] is no token
    after = server.steps()
    own, inside = ((after[name][0] - before[name][0]) / (after[name][1] - before[name][1]) for name in TIMES)
    return {
        "us of loop per event": loop_s / measured * 1e6,
        "events per token": events_per_token,
        "tokens/s": measured / events_per_token / seconds,
        "own ms/step": own * 1e3,
        "model ms/step": inside * 1e3,
    }


def bodies(kind: str, tokens: int) -> dict[str, Any]:
    """Return a request of a kind."""
    body: dict[str, Any] = {"max_tokens": tokens, "ignore_eos": True, "temperature": 0, "stream": True}
    if kind == "chat":
        return {**body, "messages": [{"role": "user", "content": "Tell me a story."}]}
    return {**body, "prompt": "Once upon a time", **({"logprobs": 3} if kind == "logprobs" else {})}


async def run_engine(engine: Engine, rows: int, tokens: int, *, read: bool) -> dict[str, float]:
    """Run `rows` requests without HTTP; a task reads each of them, as its tokens come or when all have ended."""
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    engine.trace.clear()  # pyright: ignore[reportAttributeAccessIssue]

    async def one(row: int) -> None:
        async with engine.open_stream(Submission([5 + (row * 7 + i) % 200 for i in range(16)], params)) as stream:
            if not read:
                await engine.wait_idle()
            async for _ in stream:
                pass

    began = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for row in range(rows):
            nursery.start_soon(one, row)
    seconds = time.perf_counter() - began
    steps = [(one.own_s, one.stats.seconds) for one in engine.trace if one.own_s and one.counts == (1,) * rows]
    own, inside = (statistics.median(column) for column in zip(*steps, strict=True))
    return {"ms/step": seconds / tokens * 1e3, "own ms/step": own * 1e3, "model ms/step": inside * 1e3}


async def alone(model: str, rows: list[int], tokens: int, rounds: int) -> None:
    """Print the table of the engine without HTTP."""
    config = Config(engine=EngineConfig(model=model, max_batch_size=max(rows), num_kv_blocks=blocks(max(rows), tokens)))
    async with open_engine(config, tune_interpreter=True) as engine:
        for num in rows:
            for read in (False, True):
                found = [await run_engine(engine, num, tokens, read=read) for _ in range(rounds + 1)][1:]
                show(f"engine, {num} rows, {'read' if read else 'unread'}", found)


def show(what: str, found: list[dict[str, float]]) -> None:
    """Print a line of medians with their ranges."""
    columns = {name: sorted(one[name] for one in found) for name in found[0]}
    cells = [f"{name} {statistics.median(c):.2f} ({c[0]:.2f}-{c[-1]:.2f})" for name, c in columns.items()]
    print(f"{what:30} {', '.join(cells)}", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(demo_model_path()))
    parser.add_argument("--streams", type=int, nargs="*", default=[32, 128, 256])
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 32, 256], help="for the engine without HTTP")
    parser.add_argument("--kinds", nargs="*", default=["completions"], help="completions, chat, logprobs")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--idle", type=float, default=0.0, metavar="SECONDS")
    args = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    if args.streams:
        with served(args.model, max(args.streams), args.tokens) as server:
            for kind in args.kinds:
                for streams in args.streams:
                    stream(server, streams, bodies(kind, args.tokens))  # records the tapes
                    found = [stream(server, streams, bodies(kind, args.tokens)) for _ in range(args.rounds)]
                    show(f"{kind}, {streams} streams", found)
            if args.idle:
                before = server.cpu_s()
                time.sleep(args.idle)
                print(f"idle: {(server.cpu_s() - before) / args.idle:.2%} of a core over {args.idle:g} s")
    if args.rows:
        trio.run(alone, args.model, args.rows, args.tokens, args.rounds)


if __name__ == "__main__":
    main()
