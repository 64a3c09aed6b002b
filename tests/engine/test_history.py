"""What the engine remembers of past steps is bounded by what it takes, whatever the steps look like."""

from __future__ import annotations

import tracemalloc

import pytest

from tests.core.loop import Loop
from trio_llm.engine import history
from trio_llm.engine.history import History
from trio_llm.messages import BlockAsk, BlockGrant, BlockStats

# Beyond 256, so that each is an object of its own, and shared by the steps as in the core.
IDS = list(range(1000, 6000))
ROWS = 2000


def plan(past: History, step: int, *, rows: int, running: int, waiting: int, blocks: int) -> None:
    """Let it remember a step; each row has so many new blocks."""
    ids, none = tuple(IDS[:rows]), (0,) * rows
    starts = tuple([step + 300 for _ in ids])
    counts = tuple([step + 600 for _ in ids])
    new = tuple([((step, tuple(IDS[:blocks])),) if blocks else () for _ in ids])
    ask = BlockAsk(step, (), (), (), ids, none, none, none, (), tuple(IDS[:running]), tuple(IDS[:waiting]), 512, 512)
    past.planned(0.5 + step, None, ask, BlockGrant(step, ids, starts, counts, new, 0, (), _stats(step)), None)


def _stats(step: int) -> BlockStats:
    return BlockStats(5000, (step + 300,), step + 300, 0, 0)


@pytest.mark.parametrize(
    "sizes",
    [
        {"rows": 1, "running": 1, "waiting": 0, "blocks": 0},
        {"rows": 256, "running": 256, "waiting": 0, "blocks": 0},
        {"rows": 1, "running": 256, "waiting": 256, "blocks": 0},
        {"rows": 1, "running": 1, "waiting": 0, "blocks": 4000},
    ],
    ids=["one row", "decodes", "many prefills", "a long cached prompt"],
)
def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch, sizes: dict[str, int]) -> None:
    """At most 300 bytes for each row that it may remember, and not so much less that it forgets for nothing."""
    monkeypatch.setattr(history, "MAX_ROWS", ROWS)
    past = History(Loop().blocks, 256)
    tracemalloc.start()
    try:
        step = 0
        while len(past._steps) == step:  # Until it forgets the first one.
            step += 1
            plan(past, step, **sizes)
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 75 * ROWS <= taken <= 300 * ROWS
