"""What the benchmarks share: a server of their own on a free port, a client that costs little, honest figures.

The client is one Trio process with bare sockets: on a machine whose cores the server needs too, a heavier one would
be measured along with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import attrs
import trio

HOST = "127.0.0.1"
START_TIMEOUT_S = 120
STOP_TIMEOUT_S = 60


@attrs.frozen
class Server:
    """A running `trio-llm serve`; `exec_s` is when it was started, on time.perf_counter's clock."""

    port: int
    exec_s: float
    process: subprocess.Popen[bytes]


@contextlib.contextmanager
def serving(*flags: str) -> Iterator[Server]:
    """Run `trio-llm serve` with these flags on a free port; stop it with SIGTERM and insist on exit code 0."""
    port = free_port()
    command = [sys.executable, "-m", "trio_llm", "serve", "--host", HOST, "--port", str(port)]
    with tempfile.TemporaryFile() as log:
        started_s = time.perf_counter()
        process = subprocess.Popen(
            [*command, "--rate-limit-requests", "0", *flags], stdout=subprocess.DEVNULL, stderr=log
        )
        try:
            yield Server(port, started_s, process)
            process.send_signal(signal.SIGTERM)
            code = process.wait(STOP_TIMEOUT_S)
        except BaseException:
            log.seek(0)
            sys.stderr.write(log.read().decode())
            raise
        finally:
            process.kill()
            process.wait()
    if code != 0:
        sys.exit(f"the server ended with {code}")


def free_port() -> int:
    """Find a port that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


async def wait_until_listening(server: Server) -> None:
    """Return as soon as the server accepts a connection."""
    with trio.fail_after(START_TIMEOUT_S):
        while True:
            try:
                stream = await trio.open_tcp_stream(HOST, server.port)
            except OSError:
                if server.process.poll() is not None:
                    sys.exit("the server did not start")
                await trio.sleep(0.005)
            else:
                await stream.aclose()
                return


async def request(port: int, method: str, path: str, body: object = None) -> trio.SocketStream:
    """Send one HTTP/1.1 request on a connection of its own and return the connection."""
    payload = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n"
    if payload:
        head += f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n"
    stream = await trio.open_tcp_stream(HOST, port)
    await stream.send_all(head.encode() + b"\r\n" + payload)
    return stream


async def fetch(port: int, path: str) -> str:
    """GET a page and return its body."""
    stream = await request(port, "GET", path)
    parts = [part async for part in stream]
    await stream.aclose()
    return b"".join(parts).partition(b"\r\n\r\n")[2].decode()


@attrs.frozen
class Timing:
    """One streamed request: when it was sent, when each event with text arrived, and how many tokens it made."""

    sent_s: float
    events_s: tuple[float, ...]
    tokens: int

    @property
    def first_s(self) -> float:
        """Seconds to the first token."""
        return self.events_s[0] - self.sent_s

    @property
    def gaps_s(self) -> list[float]:
        """Seconds between events."""
        return [after - before for before, after in zip(self.events_s, self.events_s[1:], strict=False)]


async def stream_completion(port: int, path: str, body: dict[str, object]) -> Timing:
    """Stream one request to its end; anything but a good one ends the benchmark."""
    sent_s = time.perf_counter()
    stream = await request(port, "POST", path, {**body, "stream": True, "stream_options": {"include_usage": True}})
    events_s: list[float] = []
    tokens, rest, seen = 0, b"", b""
    async for part in stream:
        now = time.perf_counter()
        seen = (seen + part)[-2000:]
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data: {"):
                chunk = json.loads(line[6:])
                if chunk.get("choices"):
                    events_s.append(now)
                tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
    await stream.aclose()
    if not events_s or b"[DONE]" not in seen:
        sys.exit(f"a request failed: {seen.decode(errors='replace')}")
    return Timing(sent_s, tuple(events_s), tokens)


def scrape(text: str) -> dict[str, float]:
    """Read a /metrics page: series with its labels -> value."""
    found = re.findall(r"^([a-zA-Z_:][\w:]*(?:\{[^}]*\})?) (\S+)$", text, re.MULTILINE)
    return {name: float(value) for name, value in found}


def total(metrics: dict[str, float], name: str) -> float:
    """Add up one series over its labels."""
    return sum(value for series, value in metrics.items() if series.split("{")[0] == name)


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which this share of the values lies (nearest rank)."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Write a median and its range."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def machine() -> str:
    """Describe where the figures come from."""
    with Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
        processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
    load = os.getloadavg()[0]
    return (
        f"{processor}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}, "
        f"load average before the run {load:.1f}"
    )
