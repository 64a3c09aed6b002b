"""Does memory grow with the requests served? Mixed ones for ten minutes: grammars, tools, streams, errors.

Starts a server of the demo model, loads it with `--clients` at once, and fits a line through resident memory over the
number of requests, without the first third of the time. Ends with exit code 1 where the slope is above 64 bytes a
request. `--leak BYTES` is the control: a server that keeps so many bytes of each request must fail.

    python -m benchmarks.soak --minutes 10
    python -m benchmarks.soak --minutes 10 --leak 2000
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import trio

from tests.server.soak_mix import LEAVING, MAX_BYTES_PER_REQUEST, mix

STARTUP_S = 300.0
SAMPLE_EVERY_S = 1.0
WARM_UP = 1 / 3  # Of the time: caches, pools and the trace of steps fill.


def main() -> None:
    """Measure, or be the server that leaks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--leak", type=int, default=0, help="bytes that the server keeps of each request")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve is not None:
        serve(args.leak, args.serve)
        return
    with server(args.leak) as (port, pid):
        samples = trio.run(soak, port, pid, args.clients, args.minutes * 60)
    requests, rss = (np.array(column, float) for column in zip(*samples, strict=True))
    settled = slice(int(len(samples) * WARM_UP), None)
    slope = np.polyfit(requests[settled], rss[settled], 1)[0]
    print(
        f"{requests[-1]:.0f} requests, resident {rss[settled][0] / 2**20:.1f} MiB after the warm-up, "
        f"{rss[-1] / 2**20:.1f} MiB at the end: {slope:.1f} bytes a request"
    )
    if slope > MAX_BYTES_PER_REQUEST:
        sys.exit(f"more than {MAX_BYTES_PER_REQUEST} bytes a request stay")


def serve(leak: int, arguments: list[str]) -> None:
    """Run the command line, with a server that keeps `leak` bytes of each request."""
    from trio_llm.cli.commands import cli
    from trio_llm.server.services import Services

    hold, kept = Services.hold, list[bytes]()

    def leaking(self: Services, *args: Any) -> None:
        kept.append(os.urandom(leak))
        hold(self, *args)

    if leak:
        Services.hold = leaking  # type: ignore[method-assign]
    cli(arguments)


@contextlib.contextmanager
def server(leak: int) -> Iterator[tuple[int, int]]:
    """Run a server of the demo model; its port and process id."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.soak", "--leak", str(leak), "--serve", "serve"]
    process = subprocess.Popen([*command, "--host", "127.0.0.1", "--port", str(port), "--log-level", "error"])
    try:
        deadline = time.monotonic() + STARTUP_S
        while not is_well(port):
            if time.monotonic() > deadline or process.poll() is not None:
                sys.exit("the server does not start")
            time.sleep(0.5)
        yield port, process.pid
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def is_well(port: int) -> bool:
    """Return whether /health is 200."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False


@attrs.define
class Load:
    """The clients; `num_requests` are those that have ended."""

    port: int
    num_requests: int = 0
    numbers: Iterator[int] = attrs.field(factory=count)

    async def run(self) -> None:
        """Be one client for ever."""
        while True:
            for path, body in mix(next(self.numbers)):
                status = await self.ask(path, body)
                if status >= 500:
                    sys.exit(f"{path} answered {status}: {body}")
            await self.ask(*LEAVING, leaves=True)

    async def ask(self, path: str, body: dict[str, Any], *, leaves: bool = False) -> int:
        """Ask over a new connection and return the status; read all of the answer, or leave after its beginning."""
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
        async with await trio.open_tcp_stream("127.0.0.1", self.port) as stream:
            await stream.send_all(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
            answer = await stream.receive_some()
            while not leaves and await stream.receive_some():
                pass
        self.num_requests += 1
        return int(answer.split(b" ", 2)[1])


async def soak(port: int, pid: int, clients: int, seconds: float) -> list[tuple[int, int]]:
    """Load the server; return (requests so far, resident bytes of the server), one a second."""
    load, samples = Load(port), list[tuple[int, int]]()
    async with trio.open_nursery() as nursery:
        for _ in range(clients):
            nursery.start_soon(load.run)
        with trio.move_on_after(seconds):
            while True:
                await trio.sleep(SAMPLE_EVERY_S)
                samples.append((load.num_requests, resident_bytes(pid)))
        nursery.cancel_scope.cancel()
    return samples


def resident_bytes(pid: int) -> int:
    """Return the resident memory of a process. Linux only."""
    return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
