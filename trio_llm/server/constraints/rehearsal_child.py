"""The process that compiles grammars before the server does. Started by `rehearsal`."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from functools import cache
from typing import Any

from llguidance import LLMatcher, LLTokenizer

from trio_llm.server.children.jobs import run_jobs

# The compiler recurses as deep as rules refer to each other, and ends the process where its stack ends. The server's
# threads have at least twice as much.
_STACK_BYTES = 1 << 20


def _rehearse(job: Mapping[str, Any]) -> Mapping[str, Any]:
    thread = threading.Thread(target=_compile, args=(job["grammars"],))
    thread.start()
    thread.join()
    return {}


def _compile(grammars: list[str]) -> None:
    for text in grammars:
        LLMatcher(_vocabulary(), text, log_level=0).compute_bitmask()


@cache
def _vocabulary() -> LLTokenizer:
    return LLTokenizer("byte")


if __name__ == "__main__":
    threading.stack_size(_STACK_BYTES)
    run_jobs(_rehearse)
