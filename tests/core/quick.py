"""Every plain test of the core in one fast process, without pytest: what a mutant has to get past.

`python -m tests.core.quick` stops at the first failure. Tests that want fixtures are left out; parametrized ones run
with each of their arguments, those of Hypothesis last.
"""

from __future__ import annotations

import importlib
import inspect
import random
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import settings

MODULES = (
    "test_block_manager", "test_hybrid", "test_scheduler", "test_commit", "test_overlap", "test_stop",
    "test_detokenizer", "test_speculation", "test_prompt_lookup",
)  # fmt: skip


def tests(*, hypothesis: bool) -> Iterator[Callable[[], None]]:
    """Yield each test that can be called as it is, with or without Hypothesis."""
    for name in MODULES:
        module = importlib.import_module(f"tests.core.{name}")
        for key, test in vars(module).items():
            if key.startswith("test_") and hasattr(test, "hypothesis") == hypothesis:
                yield from [test] if hypothesis else _calls(test)


def _calls(test: Any) -> Iterator[Callable[[], None]]:
    wanted = set(inspect.signature(test).parameters)
    marks = [mark for mark in getattr(test, "pytestmark", ()) if mark.name == "parametrize"]
    if not marks and not wanted:
        yield test
    for mark in marks:
        names, values = mark.args
        for value in values:
            arguments = dict(zip(names, value, strict=True)) if isinstance(names, tuple) else {names: value}
            if set(arguments) == wanted:
                yield lambda arguments=arguments: test(**arguments)


def traffic() -> None:
    """Drive random traffic through small pools of every kind."""
    from tests.core.loop import FULL, HYBRID, SLIDING, TWO_SIZES, Loop
    from tests.core.test_oracle import guesser, simulate
    from trio_llm.core.speculation import Speculation

    rng = random.Random(0)
    for number in range(32):
        groups = [FULL, SLIDING, HYBRID, TWO_SIZES][number % 4]
        loop = Loop(
            groups,
            num_blocks=rng.choice([11, 14]) + 9 * (len(groups) - 1),
            budget=rng.choice([5, 12]),
            threshold=rng.choice([0, 4]),
            policy=rng.choice(["fcfs", "priority"]),
            caching=number % 7 != 6,
            depth=1 + number // 4 % 2,
            late=number // 8 % 2 == 1,
            speculation=Speculation(3, None) if number % 3 == 2 else None,
            guess=guesser(number, 0.7),
        )
        simulate(number, loop, num_requests=16, aborts=0.08, failures=0.05)


if __name__ == "__main__":
    for test in tests(hypothesis=False):
        test()
    traffic()
    settings.register_profile("quick", deadline=None, derandomize=True, database=None)
    settings.load_profile("quick")
    for test in tests(hypothesis=True):
        test()
