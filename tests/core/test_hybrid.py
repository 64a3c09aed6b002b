"""Attention groups with windows and different block sizes, in one pool."""

from __future__ import annotations

import pytest

from tests.core.bench import Bench, unique
from tests.core.loop import HYBRID, SLIDING, TWO_SIZES, Loop, prompt_of
from trio_llm.core.block_manager import BlockManager
from trio_llm.core.block_math import first_visible_block, max_live_blocks
from trio_llm.core.prefix import hit_length
from trio_llm.model_info import KVGroup
from trio_llm.params import SamplingParams

ONE = SamplingParams(max_tokens=1)
WINDOW = (KVGroup((0,), 4, 6),)
BOTH = (KVGroup((0,), 4), KVGroup((1,), 4, 6))


def test_a_window_sees_itself_and_those_before() -> None:
    """With window w the query at p sees positions p-w+1 to p; blocks wholly before are invisible."""
    group = KVGroup((0,), 4, 6)
    assert [first_visible_block(group, position) for position in (0, 5, 8, 9, 12, 13)] == [0, 0, 0, 1, 1, 2]
    assert first_visible_block(KVGroup((0,), 4), 1000) == 0
    assert first_visible_block(KVGroup((0,), 4, 1), 8) == 2


def test_blocks_that_left_the_window_are_freed_while_decoding() -> None:
    """However long it goes on, a window group owns a constant number of blocks, and its table reads null before."""
    bench = Bench(WINDOW, max_num_batched_tokens=8)
    bench.submit(1, 7, SamplingParams(max_tokens=50))
    used = []
    for _ in range(50):
        bench.step()
        used.append(bench.grants[-1].stats.used_blocks[0])
    assert max(used[2:]) == 3
    (table,) = bench.blocks.tables(1)
    assert table[:-3] == (0,) * (len(table) - 3)
    assert all(table[-2:])


def test_blocks_that_left_the_window_are_freed_while_prefilling() -> None:
    """A prompt much longer than the pool passes through a window in chunks."""
    bench = Bench(WINDOW, num_blocks=6, max_num_batched_tokens=8, max_model_len=1000)
    bench.submit(1, 500, ONE)
    while bench.scheduler.num_running + bench.scheduler.num_waiting:
        bench.step()
        assert bench.grants[-1].preempted == ()
    assert len(bench.grants) == 63


def test_groups_share_one_pool_and_have_tables_of_their_own() -> None:
    """Both tables grow together, without a block in common, and the full one keeps all."""
    bench = Bench(BOTH)
    bench.submit(1, 22)
    bench.step()
    bench.step()
    for _ in range(3):
        bench.step()
    full, window = bench.blocks.tables(1)
    assert len(full) == len(window) == 7
    assert all(full)
    assert window[:4] == (0, 0, 0, 0)
    assert not set(full) & set(window[4:])
    assert bench.grants[-1].stats.used_blocks == (7, 3)


def test_a_window_hit_needs_only_the_blocks_that_are_seen() -> None:
    """Earlier entries of the new table are null, also when their blocks were evicted long ago."""
    bench = Bench(WINDOW, num_blocks=8, max_num_batched_tokens=8)
    prompt = unique(1, 21)
    bench.submit(1, prompt, ONE)
    for _ in range(3):
        bench.step()
    bench.submit(2, 8, ONE)
    bench.step()
    bench.submit(3, prompt, ONE)
    plan = bench.plan()
    assert plan is not None
    assert (plan.starts, plan.counts) == ((20,), (1,))
    ((at, blocks),) = plan.new_blocks[0]
    assert at == 0
    assert blocks[:3] == (0, 0, 0)
    assert all(blocks[3:])
    assert len(blocks) == 6


@pytest.mark.parametrize(
    ("cached", "limit", "expected"),
    [
        ({0: {0, 1, 2, 3}, 1: {2, 3}}, 19, 16),
        ({0: {0, 1, 2, 3}, 1: {2}}, 19, 0),
        ({0: {0, 1, 2, 3}, 1: {0, 1, 2}}, 19, 12),
        ({0: {0, 1, 3}, 1: {0, 1, 2, 3}}, 19, 8),
        ({0: {0, 1, 2, 3}, 1: {0, 2, 3}}, 15, 4),
        ({0: {0, 1, 2, 3}, 1: {0}}, 19, 4),
        ({0: set(), 1: {0, 1, 2, 3}}, 19, 0),
    ],
)
def test_groups_agree_on_the_longest_common_hit(cached: dict[int, set[int]], limit: int, expected: int) -> None:
    """Full from the left, windows from the right, down to a length at which every group has what it needs."""
    assert hit_length(BOTH, limit, lambda group, at: int(at in cached[group])) == expected


def test_two_windows_push_each_other_down() -> None:
    """One group's shorter hit moves the other's window to blocks that are missing: only a fixed point is right."""
    groups = (KVGroup((0,), 4, 5), KVGroup((1,), 4, 9))
    cached = {0: {0, 1, 2, 4}, 1: {0, 3, 4}}
    assert hit_length(groups, 20, lambda group, at: int(at in cached[group])) == 20
    cached = {0: {0, 2, 4}, 1: {0, 1, 2, 3}}
    assert hit_length(groups, 20, lambda group, at: int(at in cached[group])) == 12
    cached = {0: {0, 2, 4}, 1: {0, 1, 3}}
    assert hit_length(groups, 20, lambda group, at: int(at in cached[group])) == 4


def test_hits_end_where_every_group_begins_a_block() -> None:
    """With blocks of two sizes a common hit is a multiple of the larger one."""
    groups = (KVGroup((0,), 2), KVGroup((1,), 8))
    bench = Bench(groups)
    bench.submit(1, unique(1, 30), ONE)
    bench.step()
    bench.submit(2, unique(1, 15), ONE)
    bench.submit(3, unique(1, 17), ONE)
    assert bench.step() == {2: 7, 3: 1}


def test_a_hole_behind_the_hit_does_no_harm() -> None:
    """Where a hit is cut back to a whole larger block, smaller blocks between there and the hole are not needed."""
    groups = (KVGroup((0,), 8), KVGroup((1,), 2, 3))
    assert hit_length(groups, 24, lambda group, at: int(group == 0 or at == 7)) == 16


def test_a_hit_of_a_window_of_one_needs_no_block() -> None:
    """A group that sees only the query itself never limits the others."""
    groups = (KVGroup((0,), 4), KVGroup((1,), 4, 1))
    assert hit_length(groups, 19, lambda group, at: int(group == 0)) == 16


def test_admission_counts_what_a_window_can_hold_at_once() -> None:
    """A long prompt is admitted beside others if its window and a chunk fit, not its whole length."""
    bench = Bench(WINDOW, num_blocks=9, max_num_batched_tokens=9, threshold=8, max_model_len=500)
    bench.submit(1, 200, ONE)
    bench.submit(2, 2)
    assert set(bench.step()) == {1, 2}
    for _ in range(20):
        bench.step()
        assert bench.grants[-1].preempted == ()


def test_blocks_that_leave_a_window_are_reserved_again() -> None:
    """While a prompt passes through its window, the blocks promised to its full group are given to nobody else."""
    bench = Bench(BOTH, num_blocks=33, max_num_batched_tokens=16, threshold=8, max_model_len=200)
    bench.submit(1, 80)
    free = []
    for at in range(20):
        if at == 5:
            bench.submit(2, 24)
        bench.step()
        assert bench.grants[-1].preempted == ()
        free.append(bench.blocks._pool.num_free - bench.blocks._reserved_blocks)
    assert free[:9] == [7] * 9  # As many as at its admission.
    assert bench.running() == [1]


def test_shared_blocks_do_not_return_when_they_leave_a_window() -> None:
    """A prompt that begins with the blocks of another reserves as many more, since it will not free them."""
    bench = Bench(BOTH, num_blocks=60, threshold=8)
    bench.submit(1, unique(1, 17))
    for _ in range(3):
        bench.step()
    bench.submit(2, (*unique(1, 16), *unique(2, 40)))
    free = []
    for _ in range(3):
        bench.step()
        free.append(bench.blocks._pool.num_free - bench.blocks._reserved_blocks)
    assert free == [36] * 3


@pytest.mark.parametrize(
    ("groups", "num_blocks", "chunk", "expected"),
    [
        ((KVGroup((0,), 16),), 11, 8, 160),
        ((KVGroup((0,), 4), KVGroup((1,), 4)), 11, 8, 20),
        (WINDOW, 6, 8, 2**31 - 1),
        (WINDOW, 5, 8, 16),
        (BOTH, 14, 8, 32),
        (BOTH, 14, None, 24),
        ((KVGroup((0,), 8), KVGroup((1,), 4)), 7, 8, 16),
    ],
)
def test_the_longest_sequence_is_known_beforehand(
    groups: tuple[KVGroup, ...], num_blocks: int, chunk: int | None, expected: int
) -> None:
    """Full groups divide the pool; a window takes its window and a chunk at most."""
    blocks = BlockManager(num_blocks=num_blocks, groups=groups, secret=b"", max_step_tokens=chunk)
    assert blocks.max_tokens() == expected


@pytest.mark.parametrize("groups", [SLIDING, HYBRID, TWO_SIZES])
def test_the_longest_sequence_really_runs_alone(groups: tuple[KVGroup, ...]) -> None:
    """A request as long as max_tokens() allows ends well in a pool that is full of other things."""
    for num_blocks in (9, 12, 17):
        loop = Loop(groups, num_blocks=num_blocks, budget=5, max_model_len=90)
        length = loop.max_model_len
        assert length > 6
        loop.submit(prompt_of(length // 2, 5), SamplingParams(max_tokens=100, ignore_eos=True))
        loop.submit(prompt_of(length - 1, 6), SamplingParams(max_tokens=100, ignore_eos=True))
        loop.run()


def test_live_blocks_stay_within_the_bound_for_every_chunk() -> None:
    """The bound that admission trusts holds for all windows, chunks and block sizes, and is reached."""
    reached = 0
    for window in range(1, 12):
        for chunk in range(1, 10):
            group = KVGroup((0,), 4, window)
            bench = Bench((group,), num_blocks=40, max_num_batched_tokens=chunk, max_model_len=80, caching=False)
            bench.submit(1, 60, SamplingParams(max_tokens=15))
            most = 0
            while bench.scheduler.num_running + bench.scheduler.num_waiting:
                bench.step()
                most = max(most, bench.grants[-1].stats.used_blocks[0])
            bound = max_live_blocks(75, group, chunk)
            assert most <= bound
            reached += most == bound
    assert reached > 20
