"""Replicas whose steps stop at a gate, which the test opens and closes from another process."""

from __future__ import annotations

import fcntl
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from trio_llm.assemble import open_engine
from trio_llm.config import Config
from trio_llm.engine import Engine
from trio_llm.messages import StepPlan

GATE = "TRIO_LLM_TEST_GATE"
"""Environment variable with the gate's path. Every process of the cluster has it, and no other."""
FREE_STEPS = 4
"""Steps that a replica still runs at a closed gate: a stream has begun then."""


@contextmanager
def closed(gate: Path) -> Iterator[None]:
    """Close the gate while the block runs."""
    with gate.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class GatedRunner:
    """A model's runner that waits at the gate. A lock is held by a process, so the gate opens when the test dies."""

    def __init__(self, runner: Any, gate: Path) -> None:
        self._runner = runner
        self._gate = gate.open("rb")
        self._num_free = FREE_STEPS

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def launch(self, plan: StepPlan, begun: Callable[[], None]) -> Callable[[], Any]:
        try:
            fcntl.flock(self._gate, fcntl.LOCK_SH | fcntl.LOCK_NB)
            self._num_free = FREE_STEPS
        except BlockingIOError:
            if self._num_free:
                self._num_free -= 1
            else:
                fcntl.flock(self._gate, fcntl.LOCK_SH)
                self._num_free = FREE_STEPS
        fcntl.flock(self._gate, fcntl.LOCK_UN)
        return self._runner.launch(plan, begun)


@asynccontextmanager
async def open_gated_engine(config: Config, **settings: Any) -> AsyncIterator[Engine]:
    """Open an engine whose steps stop at the gate, in a process that serves nothing else."""
    from trio_llm.model import load

    load_runner = load.load_runner

    def load_gated(*args: Any, **kwargs: Any) -> GatedRunner:
        return GatedRunner(load_runner(*args, **kwargs), Path(os.environ[GATE]))

    load.load_runner = load_gated  # pyright: ignore[reportAttributeAccessIssue]
    async with open_engine(config, **settings) as engine:
        engine._pulse.stall_after_s = 3600.0  # Waiting at the gate is no fault for which Ray replaces the replica.
        yield engine
