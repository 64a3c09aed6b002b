"""One request cut out of a record."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.core.loop import HYBRID
from tests.replay.test_replay import recorded
from trio_llm.core.block_pool import BlockPool
from trio_llm.errors import RecordError
from trio_llm.replay import Replay, capsule


@pytest.mark.parametrize("depth", [1, 2])
def test_a_capsule_replays_its_request(tmp_path: Path, depth: int) -> None:
    """It waits, computes, is preempted and ends in the same steps as in the whole record, beside the same requests."""
    whole = recorded(groups=HYBRID, num_requests=25, depth=depth).save(tmp_path / "whole.record")
    lives = capsule.run(whole)
    replay = Replay.open(whole)
    for request_id in list(lives)[2::5]:
        path = replay.cut(request_id, tmp_path / "one.record")
        assert path.stat().st_size < whole.stat().st_size
        life, full = capsule.run(path)[request_id], lives[request_id]
        assert (life.started_step, life.first_token_step, life.ended_step) == (
            full.started_step,
            full.first_token_step,
            full.ended_step,
        )
        assert (life.chunks, life.preempted, life.waited_steps) == (full.chunks, full.preempted, full.waited_steps)
        assert (life.reason, life.num_output_tokens) == (full.reason, full.num_output_tokens)


def test_a_capsule_fails_where_the_core_decides_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That is what a test with a capsule is for: a change of the core that changes what was planned is noticed."""
    whole = recorded(num_requests=25).save(tmp_path / "whole.record")
    life = next(life for life in capsule.run(whole).values() if life.preempted)
    path = Replay.open(whole).cut(life.request_id, tmp_path / "one.record")
    assert capsule.run(path)[life.request_id].preempted == life.preempted
    take = BlockPool.take
    monkeypatch.setattr(BlockPool, "take", lambda pool, count, group: take(pool, count, group)[::-1])
    with pytest.raises(RecordError, match="is planned differently from the record"):
        capsule.run(path)


def test_the_record_is_never_the_capsule(tmp_path: Path) -> None:
    """Cutting a record into itself would leave one request of it."""
    whole = recorded().save(tmp_path / "whole.record")
    before = whole.read_bytes()
    with pytest.raises(RecordError, match="the record itself"):
        Replay.open(whole).cut(1, whole)
    assert whole.read_bytes() == before


def test_a_request_that_is_not_all_there_is_refused(tmp_path: Path) -> None:
    """One that never arrived, or that did not end before the record did."""
    tape = recorded()
    replay = Replay.open(tape.save(tmp_path / "whole.record"))
    with pytest.raises(RecordError, match="request 999 does not arrive within"):
        replay.cut(999, tmp_path / "one.record")
    del tape.frames[len(tape.frames) // 2 :]
    half = Replay.open(tape.save(tmp_path / "half.record"))
    live = [life for life in capsule.run(tmp_path / "half.record").values() if life.reason is None]
    with pytest.raises(RecordError, match="does not end within"):
        half.cut(live[0].request_id, tmp_path / "one.record")
