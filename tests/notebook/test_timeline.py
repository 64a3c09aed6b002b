"""The history tells what each request did in each step, and the timeline and budget pictures draw just that."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import attrs

from tests.notebook.stepping import Hand
from tests.notebook.test_pictures import texts
from tests.replay.test_replay import recorded
from trio_llm.messages import BlockStats, StepStats, StepTrace
from trio_llm.notebook.timeline import draw_budget, draw_timeline, moments_of
from trio_llm.replay import Replay
from trio_llm.replay.lives import follow


def kinds(hand: Hand, request_id: int) -> list[str]:
    """Return what the request did in each step that it was part of."""
    return [moment.cells[request_id].kind for moment in hand.history.moments if request_id in moment.cells]


def test_chunked_prefill_then_decodes() -> None:
    """A prompt of 70 tokens under a budget of 32 is three prefills; the tokens after the first are decodes."""
    hand = Hand()
    hand.submit(1, list(range(70)), max_tokens=4)
    hand.run()
    assert kinds(hand, 1) == ["prefill"] * 3 + ["decode"] * 3
    assert [moment.cells[1].count for moment in hand.history.moments if moment.cells] == [32, 32, 6, 1, 1, 1]


def test_a_prompt_of_one_token_is_a_prefill() -> None:
    """One token at position 0 is a prompt, not a decode."""
    hand = Hand()
    hand.submit(1, [5], max_tokens=2)
    hand.run()
    assert kinds(hand, 1) == ["prefill", "decode"]


def test_waiting_and_preemption_are_seen() -> None:
    """A request that loses its blocks is shown preempted, then queued, then prefilled once more."""
    hand = Hand(num_blocks=6, budget_tokens=64)
    hand.submit(1, list(range(30)), max_tokens=30)
    hand.submit(2, list(range(50, 80)), max_tokens=20)
    hand.run()
    story = kinds(hand, 2)
    lost = story.index("preempted")
    assert "prefill" in story[:lost] and story[lost + 1] == "queued" and "prefill" in story[lost:]
    assert "preempted" not in kinds(hand, 1)


def test_pictures_have_a_cell_per_row() -> None:
    """The timeline has a hover text for every cell of the history, the budget one for every row that ran."""
    hand = Hand()
    hand.submit(1, list(range(40)))
    hand.submit(2, list(range(50, 90)))
    hand.run()
    cells = [cell for moment in hand.history.moments for cell in moment.cells.values()]
    assert len(texts(hand.history.timeline(), "title")) == len(cells)
    assert len(texts(hand.history.budget(), "title")) == sum(cell.count > 0 for cell in cells)


def test_hover_tells_the_tokens() -> None:
    """The hover text of a decode tells what it read and what it sampled."""
    hand = Hand()
    hand.submit(1, [7, 8, 9], max_tokens=2)
    hand.run()
    assert any("'w1001'; samples 'w1002'" in hover for hover in texts(hand.history.timeline(), "title"))


def test_diff_of_two_steps() -> None:
    """The history draws what changed in the pool between two of its steps."""
    hand = Hand()
    hand.submit(1, list(range(40)))
    hand.run()
    assert "step 1 to step 2" in hand.history.diff(0, 1).title


def _trace(step: int, request_ids: tuple[int, ...], starts: tuple[int, ...], counts: tuple[int, ...]) -> StepTrace:
    blocks = BlockStats(20, (0,), 0, 0, 0)
    return StepTrace(request_ids, starts, counts, StepStats(step, 0.0, 1, 1, 0, 0, 1, 0, 0, blocks), None)


def test_a_live_trace_becomes_moments() -> None:
    """From an engine's trace alone, prefills and decodes are told apart, and what was computed again is seen."""
    traces = [
        _trace(1, (1, 2), (0, 0), (32, 1)), _trace(2, (1, 2), (32, 1), (1, 1)), _trace(3, (1,), (16,), (18,)),
    ]  # fmt: skip
    moments = moments_of(traces)
    assert [{request_id: cell.kind for request_id, cell in moment.cells.items()} for moment in moments] == [
        {1: "prefill", 2: "prefill"}, {1: "decode", 2: "decode"}, {1: "prefill"},
    ]  # fmt: skip
    assert "again after a preemption" in moments[2].cells[1].hover
    assert texts(draw_timeline(moments), "title") and texts(draw_budget(moments, 64), "title")


def test_a_trace_and_explanations_tell_who_waited(tmp_path: Path) -> None:
    """What a replay explains fills the steps that have no row of a request: queued, and where it lost its blocks."""
    replay = Replay.open(recorded().save(tmp_path / "a.record"))
    told = {life.request_id: replay.explain(life.request_id) for life in follow(replay)[0]}
    seen: Counter[str] = Counter()
    for moment in moments_of(replay.traces(), told):
        for request_id, cell in moment.cells.items():
            one, seen[cell.kind] = told[request_id], seen[cell.kind] + 1
            waited = any(wait.first_step <= moment.step <= wait.last_step for wait in one.waits)
            assert (cell.kind == "preempted") == (moment.step in one.preempted_steps)
            assert cell.count > 0 or waited
    assert min(seen[kind] for kind in ("queued", "preempted", "prefill", "decode")) > 0


def test_drafts_are_no_prompt() -> None:
    """A row with drafts is a decode, also where the drafts before it were rejected, which is no preemption."""
    traces = [_trace(1, (1,), (0,), (20,)), _trace(2, (1,), (20,), (5,)), _trace(3, (1,), (22,), (5,))]
    stats = attrs.evolve(traces[0].stats, drafted=(1, 1, 1, 1))
    first, second, third = moments_of([traces[0], *[attrs.evolve(trace, stats=stats) for trace in traces[1:]]])
    assert [moment.cells[1].kind for moment in (first, second, third)] == ["prefill", "decode", "decode"]
    assert "preemption" not in third.cells[1].hover
    hand = Hand()
    cell = hand.history._row((7, 8, 9), 20, 2, True, (8,))
    assert (cell.kind, cell.count) == ("decode", 3)


def test_nothing_to_draw() -> None:
    """An empty history is an empty picture, not an error."""
    assert texts(draw_timeline([]), "title") == texts(draw_budget([], 32), "title") == []
