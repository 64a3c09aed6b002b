"""Compile a client's grammar in a process of its own first: only one that ends in time is compiled in this process.

A thread cannot be ended. Some grammars, intersections of expressions for example, keep the compiler busy for minutes or
hours, and a few threads that are stuck would leave nobody a new grammar.
"""

from __future__ import annotations

import atexit
import re
from collections.abc import Iterator
from functools import cache

from trio_llm.errors import InvalidRequestError
from trio_llm.grammar import GrammarSource
from trio_llm.server.bodies.size_limits import flag_of
from trio_llm.server.children.pool import ChildCrashError, ChildPool, ChildTimeoutError

# A guess: grammars of 60 KB compile within 70 MB.
_MEMORY_BYTES = 1 << 30
# The process has a vocabulary of bytes, which takes no time to index; other ids are errors there.
_TOKEN_IDS = re.compile(r"<\[[^\]]*\]>")


def rehearse(source: GrammarSource, cpu_s: float) -> None:
    """Compile a grammar and each of its parts within this CPU time. Blocks meanwhile.

    What is wrong with it is left to the compilation in this process.

    Raises:
        InvalidRequestError: It takes longer, or ends the process.
        OverloadedError: The machine allows no new process now, or its processes are killed.
    """
    job = {"grammars": [_TOKEN_IDS.sub("<[0]>", text) for text in _texts(source)]}
    try:
        compilers().run(job, cpu_s=cpu_s, memory_bytes=_MEMORY_BYTES)
    except ChildTimeoutError:
        raise too_long(source, cpu_s) from None
    except ChildCrashError:
        message = f"{source.param} cannot be used: it is too complex to compile."
        raise InvalidRequestError(message, source.param) from None


def too_long(source: GrammarSource, limit_s: float) -> InvalidRequestError:
    """Return the error of a grammar that takes too long."""
    return InvalidRequestError(
        f"{source.param} takes longer than {limit_s:g} s to compile ({flag_of('grammar_timeout_s')}).", source.param
    )


@cache
def compilers() -> ChildPool:
    """Return the pool of processes, shared in this process."""
    pool = ChildPool("trio_llm.server.constraints.rehearsal_child", "compiles grammars")
    atexit.register(pool.close)
    return pool


def _texts(source: GrammarSource) -> Iterator[str]:
    """Yield the parts first: an error in the whole hides what it would cost."""
    for form in source.forms:
        yield from _texts(form)
    yield source.text
