"""`trio-llm bench startup`: from the start of `trio-llm serve` to the first token of a request.

The clock starts before the process does and stops when the first event with text is there. Every round is a fresh
process; the first one, which brings the files into the page cache, is thrown away.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import trio

from trio_llm.cli.bench.child import serving
from trio_llm.cli.bench.report import Figure, Row
from trio_llm.cli.bench.serve import stream

_QUESTION: dict[str, object] = {"prompt": "What is the capital of Japan?", "max_tokens": 16}


def startup(flags: Sequence[str], repetitions: int) -> list[Row]:
    """Start servers one after the other."""
    rounds = [trio.run(_first_token, flags) for _ in range(repetitions + 1)][1:]
    listening_s, first_s = zip(*rounds, strict=True)
    asked_s = tuple(first - listening for listening, first in rounds)
    figures = [
        Figure("listening", "s", listening_s, 2),
        Figure("first token", "s", first_s, 2),
        Figure("of which the request", "s", asked_s, 3),
    ]
    return [({}, figures)]


async def _first_token(flags: Sequence[str]) -> tuple[float, float]:
    """Return the seconds until it listens and until the first token is there."""
    with serving(flags) as child:
        await child.listening()
        listening_s = time.perf_counter() - child.started_s
        timing = await stream(child.api, "/completions", dict(_QUESTION))
    return listening_s, timing.events_s[0] - child.started_s
