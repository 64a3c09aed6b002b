"""What the engine says of a request's time agrees with what it counted, under load that waits, preempts and drafts."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import attrs
import pytest

from tests.engine.fakes import HashStub, open_stub
from tests.engine.test_speculation import MOST, DraftingStub
from trio_llm.engine.messages import RequestStats
from trio_llm.errors import RecordError
from trio_llm.params import SamplingParams, Submission
from trio_llm.replay import Replay
from trio_llm.replay.explanation import Explanation


def _submission(rng: random.Random) -> Submission:
    prompt = [rng.randrange(2)] * rng.randrange(1, 70)
    return Submission(prompt, SamplingParams(max_tokens=rng.randrange(1, 50), seed=rng.randrange(100)))


async def explained(**settings: Any) -> tuple[dict[int, Explanation], dict[int, RequestStats], float]:
    """Serve random requests; return explanations and statistics by request, and the drafts that were accepted."""
    rng = random.Random(3)
    stats: dict[int, RequestStats] = {}
    found: dict[int, Explanation] = {}
    sizes = {"max_num_batched_tokens": 24, "max_batch_size": 6, "max_waiting_batches": 20, "max_model_len": 128}
    # The draft model is right half of the time.
    runner = DraftingStub(0.5, num_kv_blocks=14) if settings.get("spec_method") else HashStub(num_kv_blocks=14)
    async with open_stub(runner, **sizes, **settings) as engine:
        engine.watch_ended(lambda one: stats.update({one.request_id: one}))

        # All arrive before the first step, so that every run is the same.
        streams = [engine.open_stream(_submission(rng)) for _ in range(40)]
        for stream in streams:
            await stream.collect()
        await engine.render_metrics()
        for request_id in stats:
            explanation = await engine.explain(request_id)
            assert explanation is not None
            found[request_id] = explanation
        name = "vllm:spec_decode_num_accepted_tokens_total"
        accepted = engine.registry.get_sample_value(name, {"model_name": "stub", "engine": "0"}) or 0
    return found, stats, accepted


@pytest.mark.parametrize(
    "settings", [{}, {"async_scheduling": True}, {"spec_method": "draft_model", "max_draft_tokens": MOST}]
)
async def test_explanations_agree_with_the_counts(settings: dict[str, Any]) -> None:
    """Chunks cover the prompt after the cached part; preemptions, cached tokens and accepted drafts add up."""
    found, stats, accepted = await explained(**settings)
    assert len(found) == 40
    for request_id, one in found.items():
        counted = stats[request_id]
        assert one.complete
        assert (one.state, one.reason) == ("ended", counted.reason)
        assert one.num_cached_tokens == counted.num_cached_tokens
        assert len(one.preempted_steps) == counted.num_preemptions
        computed = {at for chunk in one.chunks for at in range(chunk.first, chunk.first + chunk.count)}
        assert computed >= set(range(one.num_cached_tokens, one.num_prompt_tokens))
        assert one.chunks[0].first == one.num_cached_tokens
        assert any(chunk.again for chunk in one.chunks) <= bool(one.preempted_steps)
        assert all(wait.seconds >= 0 and wait.first_step <= wait.last_step for wait in one.waits)
        assert one.accepted is not None
        assert 0 <= one.accepted <= one.drafts
    assert sum(one.accepted or 0 for one in found.values()) == accepted
    assert sum(len(one.preempted_steps) for one in found.values()) > 0
    reasons = {wait.reason for one in found.values() for wait in one.waits}
    assert {"blocks", "order"} <= reasons <= {"blocks", "order", "budget", "batch"}
    if settings.get("spec_method"):
        assert accepted > 0


async def test_holders_are_those_that_hold() -> None:
    """While a request waits for blocks, the others hold what is not free, as far as they have rows."""
    found, _, _ = await explained(enable_prefix_caching=False)
    waits = [wait for one in found.values() for wait in one.waits if wait.reason == "blocks"]
    assert waits
    for wait in waits:
        assert sum(wait.holders.values()) <= 13 - wait.free_blocks
        assert wait.holders


@pytest.mark.parametrize("settings", [{}, {"spec_method": "draft_model", "max_draft_tokens": MOST}])
async def test_a_record_explains_as_the_engine_does(settings: dict[str, Any], tmp_path: Path) -> None:
    """A replay tells of every request what the engine told, apart from texts."""
    found, _, _ = await explained(record=str(tmp_path), **settings)
    replay = Replay.open(tmp_path)
    for request_id, one in found.items():
        told, expected = attrs.asdict(replay.explain(request_id)), attrs.asdict(one)
        assert told.pop("difference") is None
        del expected["difference"]
        assert _timeless(told) == _timeless(expected)
    assert any(one.preempted_steps for one in found.values())
    with pytest.raises(RecordError, match="no request 1000"):
        replay.explain(1000)


def _timeless(value: Any) -> Any:
    """Return it without its times: the engine and its record read the clock one after the other."""
    match value:
        case float():
            return "a time"
        case dict():
            return {key: _timeless(one) for key, one in value.items()}
        case list():
            return [_timeless(one) for one in value]
        case _:
            return value
