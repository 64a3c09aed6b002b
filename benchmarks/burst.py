"""Do many prompts at once, or one long prompt, make others wait? On a CPU, at default settings.

Starts a server, sends 64 prompts at once and prints the times to their first tokens. Then four clients stream, a prompt
of 1,500 tokens comes, and the longest pause of the four streams is printed.

    python benchmarks/burst.py --model DIR
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from functools import partial
from itertools import pairwise

import trio

PROMPTS, PROMPT_WORDS, ANSWER_TOKENS = 64, 60, 16
STREAMS, STREAM_TOKENS, LONG_WORDS = 4, 120, 1480
STARTUP_S = 180.0


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: the demo model")
    parser.add_argument("--port", type=int, default=8753)
    args = parser.parse_args()
    command = [sys.executable, "-m", "trio_llm", "serve", "--host", "127.0.0.1", "--port", str(args.port)]
    command += ["--log-level", "warning", *(["--model", args.model] if args.model else [])]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        trio.run(measure, args.port)
    finally:
        process.terminate()
        process.wait(30)


async def measure(port: int) -> None:
    """Wait for the server, then print both figures."""
    print("load before:", *(f"{load:.1f}" for load in os.getloadavg()))
    with trio.fail_after(STARTUP_S):
        while True:
            try:
                await tokens_at(port, words(0, 8), 4)
                break
            except OSError:
                await trio.sleep(0.2)
    firsts: list[float] = []
    async with trio.open_nursery() as nursery:
        for number in range(PROMPTS):
            nursery.start_soon(partial(note_first, port, number, firsts))
    firsts.sort()
    share = {part: firsts[int(part * (len(firsts) - 1))] for part in (0.0, 0.5, 0.95, 1.0)}
    print(f"{PROMPTS} prompts at once, TTFT s:", *(f"p{100 * part:.0f} {value:.2f}" for part, value in share.items()))
    times: list[list[float]] = []
    async with trio.open_nursery() as nursery:
        for number in range(STREAMS):
            nursery.start_soon(partial(note_all, port, number, times))
        await trio.sleep(1.5)
        began = time.monotonic()
        long = await tokens_at(port, words(99, LONG_WORDS), 4)
    gaps = sorted(b - a for stream in times for a, b in pairwise(stream))
    marks = {part: gaps[int(part * (len(gaps) - 1))] * 1000 for part in (0.5, 0.99, 1.0)}
    print(f"a long prompt beside {STREAMS} streams: TTFT {long[0] - began:.2f} s; pauses of the streams ms:", end=" ")
    print(*(f"p{100 * part:.0f} {value:.0f}" for part, value in marks.items()))
    print("load after:", *(f"{load:.1f}" for load in os.getloadavg()))


async def note_first(port: int, number: int, firsts: list[float]) -> None:
    """Add the time to the first token of a prompt."""
    began = time.monotonic()
    firsts.append((await tokens_at(port, words(number, PROMPT_WORDS), ANSWER_TOKENS))[0] - began)


async def note_all(port: int, number: int, times: list[list[float]]) -> None:
    """Add when each part of a stream came."""
    times.append(await tokens_at(port, words(number + 70, 20), STREAM_TOKENS))


def words(number: int, count: int) -> str:
    """Return a prompt of about `count` tokens that shares no beginning with another."""
    vocabulary = "the cat sat on a mat in our house".split()
    return " ".join([str(number), *(vocabulary[(number * 5 + i * (number + 1)) % 9] for i in range(1, count))])


async def tokens_at(port: int, prompt: str, max_tokens: int) -> list[float]:
    """Stream one answer; return when each part came."""
    body = json.dumps({"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
    times: list[float] = []
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        times += [time.monotonic() async for data in stream if b"data: {" in data]
    if not times:
        raise OSError("no answer")
    return times


if __name__ == "__main__":
    main()
