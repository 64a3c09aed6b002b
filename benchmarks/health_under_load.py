"""Does /health answer in time under load? 1,000 streams, 200 of them never read, and bursts of 500 new connections.

Starts a server and a process that loads it, both on this machine, and asks /health over a new connection 20 times a
second. Ends by itself, with exit code 1 where the 99th percentile is above the bound.

    python benchmarks/health_under_load.py --seconds 30
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import trio

BURST_EVERY_S = 2.0
PROBE_EVERY_S = 0.05
STARTUP_S = 120.0
SETTLE_S = 5.0


def main() -> None:
    """Measure, or be the process that loads the server."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0, help="how long /health is asked")
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--stalled", type=int, default=200, help="of these, how many are never read")
    parser.add_argument("--burst", type=int, default=500, help="new connections at once, every 2 s; 0 for none")
    parser.add_argument("--bound-ms", type=float, default=100.0, help="for the 99th percentile")
    parser.add_argument("--load-port", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load_port is not None:
        trio.run(load, args.load_port, args.streams, args.stalled, args.burst, args.seconds + SETTLE_S)
        return
    with server(args.streams) as port:
        again = [sys.executable, __file__, *sys.argv[1:], "--load-port", str(port)]
        loading = subprocess.Popen(again, stdout=subprocess.PIPE, text=True)
        try:
            time.sleep(SETTLE_S)
            times_ms = sorted(probe(port, args.seconds))
            done, _ = loading.communicate(timeout=60)
        finally:
            loading.kill()
    p50, p99 = (times_ms[int(part * (len(times_ms) - 1))] for part in (0.5, 0.99))
    print(done.strip())
    print(f"/health: {len(times_ms)} times, p50 {p50:.1f} ms, p99 {p99:.1f} ms, longest {times_ms[-1]:.1f} ms")
    if p99 > args.bound_ms:
        sys.exit(f"the 99th percentile is above {args.bound_ms:g} ms")


@contextlib.contextmanager
def server(streams: int) -> Iterator[int]:
    """Run a server of the demo model with room for the streams; its port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "trio_llm", "serve", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--log-level", "warning", "--max-batch-size", "256", "--max-waiting-batches", str(streams // 256 + 2)]
    process = subprocess.Popen([*command, "--write-timeout", "600"])
    try:
        deadline = time.monotonic() + STARTUP_S
        while True:
            with contextlib.suppress(OSError):
                ask_health(port)
                break
            if time.monotonic() > deadline or process.poll() is not None:
                sys.exit("the server does not start")
            time.sleep(0.2)
        yield port
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def ask_health(port: int) -> None:
    """Ask over a new connection, as probes do."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    with contextlib.closing(connection):
        connection.request("GET", "/health")
        response = connection.getresponse()
        response.read()
    if response.status != 200:
        sys.exit(f"/health answered {response.status}")


def probe(port: int, seconds: float) -> list[float]:
    """Return how long each answer took, in milliseconds."""
    times_ms: list[float] = []
    end = time.monotonic() + seconds
    while (began := time.monotonic()) < end:
        ask_health(port)
        times_ms.append((time.monotonic() - began) * 1000)
        time.sleep(PROBE_EVERY_S)
    return times_ms


async def load(port: int, streams: int, stalled: int, burst: int, seconds: float) -> None:
    """Keep the streams open and send the bursts, until the time is up."""
    body = json.dumps({"prompt": "Once upon a time", "max_tokens": 1000, "ignore_eos": True, "stream": True}).encode()
    post = _request("POST /v1/completions", body)
    counts = {"streams": 0, "bytes": 0, "bursts": 0, "answers": 0}

    async def stream(reads: bool) -> None:
        while True:
            with contextlib.suppress(OSError, trio.BrokenResourceError):
                async with await trio.open_tcp_stream("127.0.0.1", port) as connection:
                    if not reads:
                        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                    await connection.send_all(post)
                    counts["streams"] += 1
                    if not reads:
                        await trio.sleep_forever()
                    async for data in connection:
                        counts["bytes"] += len(data)
            await trio.sleep(0.1)

    async def one() -> None:
        with contextlib.suppress(OSError, trio.BrokenResourceError):
            async with await trio.open_tcp_stream("127.0.0.1", port) as connection:
                await connection.send_all(_request("GET /v1/models"))
                if await connection.receive_some():
                    counts["answers"] += 1

    with trio.move_on_after(seconds):
        async with trio.open_nursery() as nursery:
            for index in range(streams):
                nursery.start_soon(stream, index >= stalled)
                await trio.sleep(SETTLE_S / 2 / streams)
            while burst:
                counts["bursts"] += 1
                for _ in range(burst):
                    nursery.start_soon(one)
                await trio.sleep(BURST_EVERY_S)
            await trio.sleep_forever()
    print(", ".join(f"{count} {what}" for what, count in counts.items()))


def _request(line: str, body: bytes = b"") -> bytes:
    head = (
        f"{line} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


if __name__ == "__main__":
    main()
