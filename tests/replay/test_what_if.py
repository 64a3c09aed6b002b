"""The same arrivals with another configuration, and the recorded answers generated again."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import attrs
import pytest

from tests.core.loop import FULL, HYBRID, SLIDING, TWO_SIZES
from tests.replay.test_replay import DRAFT_MODEL, LOOKUP, recorded
from trio_llm.errors import RecordError
from trio_llm.messages import StepPlan
from trio_llm.replay import Replay
from trio_llm.replay.cost import CostModel
from trio_llm.replay.what_if import History, Simulation, changed


def opened(path: Path, groups: tuple = FULL, **options: Any) -> Replay:
    """Record a run and open it."""
    return Replay.open(recorded(groups=groups, num_requests=25, **options).save(path / "run.record"))


@pytest.mark.parametrize("groups", [FULL, SLIDING, HYBRID, TWO_SIZES])
@pytest.mark.parametrize("tokens", [False, True])
def test_every_request_gets_its_recorded_answer(tmp_path: Path, groups: tuple, tokens: bool) -> None:
    """Whatever the configuration, a request that ended by itself ends there after as many tokens and as it did."""
    replay = opened(tmp_path, groups, tokens=tokens, depth=2)
    history = History.of(replay)
    cost = CostModel.fit(history.steps)
    for changes in ({}, {"num_kv_blocks": 64}, {"max_num_batched_tokens": 7}, {"scheduling_policy": "priority"}):
        run = Simulation(replay, history, changed(replay.setup, changes, tokens=tokens), cost)
        outcome = run.run()
        assert [one.request_id for one in outcome.latencies] == [
            call.request.request_id for call in history.calls if hasattr(call, "request")
        ]
        for request_id, recorded_life in history.lives.items():
            life = run._lives.lives[request_id]
            if recorded_life.reason in ("stop", "length"):
                assert (life.reason, life.num_output_tokens) in (
                    (recorded_life.reason, recorded_life.num_output_tokens),
                    ("abort", life.num_output_tokens),  # Its client left earlier on modelled time.
                )


def test_more_blocks_end_preemption(tmp_path: Path) -> None:
    """With room for all, nothing is preempted, and no answer takes more steps than with too few blocks."""
    replay = opened(tmp_path)
    asked = replay.what_if(num_kv_blocks=200, scheduling_policy="fcfs")
    before, after = (sum(one.num_preemptions for one in run.latencies) for run in (asked.before, asked.after))
    assert before > after == 0
    rows = {name: (one, two) for name, one, two in asked.rows()}
    assert rows["preemptions"] == (before, 0)
    assert rows["steps"][1] < rows["steps"][0]
    assert "num_kv_blocks=200" in repr(asked)
    assert "<td>preemptions</td>" in asked._repr_html_()


def test_drafts_need_the_tokens(tmp_path: Path) -> None:
    """With them, look-ups are made in the recorded output; without, only their absence is known."""
    replay = opened(tmp_path, tokens=True)
    asked = replay.what_if(max_draft_tokens=3, lookup=(1, 3))
    assert all(one.total_s is not None for one in asked.after.latencies)
    without = opened(tmp_path, speculation=LOOKUP)
    assert without.what_if(num_kv_blocks=40).after.num_steps > 0
    with pytest.raises(RecordError, match="drafts depend on the tokens"):
        without.what_if(max_draft_tokens=3, lookup=(1, 3))
    drafted = opened(tmp_path, speculation=DRAFT_MODEL, tokens=True)
    with pytest.raises(RecordError, match="what a draft model would have drafted"):
        drafted.what_if(max_draft_tokens=2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kv_blocks": 9}, r"what_if\(kv_blocks=...\): there is no such setting; there are num_kv_blocks, "),
        ({"num_kv_blocks": 4}, r"request \d+ has \d+ tokens: this holds 12"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    """The error names the setting, or the request that does not fit."""
    with pytest.raises(RecordError, match=words):
        opened(tmp_path).what_if(**changes)


def _plan(starts: tuple[int, ...], counts: tuple[int, ...]) -> StepPlan:
    ids = tuple(range(len(starts)))
    return StepPlan(1, (), (), ids, starts, counts, (0,) * sum(counts), (True,) * len(ids), ((),) * len(ids))


def test_the_cost_of_steps_is_found() -> None:
    """From steps that cost what the model says, it finds the parts; none is negative, whatever the times are."""
    rng = random.Random(1)
    plans = [
        _plan(
            tuple(rng.choice([0, 5, 90]) for _ in range(4)),
            tuple(rng.choice([1, 1, 20]) for _ in range(4)),
        )
        for _ in range(60)
    ]
    true = CostModel(0.004, 0.0003, 0.0002, 0.00001, 0.0)
    found = CostModel.fit([(plan, true.seconds(plan)) for plan in plans])
    assert attrs.astuple(found) == pytest.approx(attrs.astuple(true), abs=1e-9)
    for _ in range(20):
        fitted = CostModel.fit([(plan, rng.random()) for plan in plans])
        assert min(attrs.astuple(fitted)) >= 0


@attrs.frozen
class _Output:
    outputs: tuple[Any, ...]


@attrs.frozen
class _Sample:
    token_ids: tuple[int, ...]


def test_answers_are_compared(tmp_path: Path) -> None:
    """A checkpoint that answers otherwise is noticed, by request; a record without tokens cannot tell."""
    replay = opened(tmp_path, tokens=True)
    history = History.of(replay)
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for life in history.lives.values():
        by_prompt.setdefault(tuple(life.request.prompt or ()), []).append(life.request_id)
    asked: list[tuple[int, ...]] = []

    def generate(prompts: list[dict[str, tuple[int, ...]]], params: list[Any], *, use_tqdm: bool) -> list[_Output]:
        assert len(prompts) == len(params)
        assert not use_tqdm
        asked.extend(prompt["prompt_token_ids"] for prompt in prompts)
        return [_Output((_Sample(()),)) for _ in prompts]

    different = replay.compare(generate)
    assert len(different) == len(asked) > 5
    assert all(request_id in by_prompt[prompt] for request_id, prompt in zip(different, asked, strict=True))

    def right(prompts: list[dict[str, tuple[int, ...]]], params: list[Any], *, use_tqdm: bool) -> list[_Output]:
        return [_Output((_Sample(tuple(history.outputs[request_id])),)) for request_id in different]

    assert replay.compare(right) == []
    with pytest.raises(RecordError, match="--record-tokens"):
        opened(tmp_path).compare(right)
