"""Time from the start of `trio-llm serve` to the first token of a request.

The clock starts before the process does and stops when the first event with text arrives on a socket. Every round is
a fresh process with the demo model; the files are in the page cache after the first round, which is thrown away.

    python benchmarks/startup.py --rounds 7
"""

from __future__ import annotations

import argparse
import statistics
import time

import trio
from common import machine, serving, spread, stream_completion, wait_until_listening

QUESTION = {"messages": [{"role": "user", "content": "What is the capital of Japan?"}], "max_tokens": 16}


async def first_token(flags: list[str]) -> tuple[float, float]:
    """Start a server and return the seconds until it listens and until the first token is there."""
    with serving(*flags) as server:
        await wait_until_listening(server)
        listening_s = time.perf_counter() - server.exec_s
        timing = await stream_completion(server.port, "/v1/chat/completions", dict(QUESTION))
    return listening_s, timing.events_s[0] - server.exec_s


def main() -> None:
    """Run the rounds and print medians with their ranges."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("flags", nargs="*", help="flags for `trio-llm serve`, after --")
    options = parser.parse_args()
    print(machine())
    rounds = [trio.run(first_token, options.flags) for _ in range(options.rounds + 1)][1:]
    listening_s, first_s = zip(*rounds, strict=True)
    print(f"listening    {spread(listening_s)} s")
    print(f"first token  {spread(first_s)} s")
    print(f"of which the request itself {statistics.median(first_s) - statistics.median(listening_s):.3f} s")


if __name__ == "__main__":
    main()
