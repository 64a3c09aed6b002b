"""Golden scenarios: who owns which block, what is shared, freed and evicted."""

from __future__ import annotations

import random
from unittest.mock import patch

import pytest

from tests.core.bench import Bench, unique
from trio_llm.core.block_manager import BlockManager
from trio_llm.core.prefix import Chain
from trio_llm.core.scheduler import Scheduler
from trio_llm.messages import Admit, BlockAsk, StepResult
from trio_llm.model_info import KVGroup
from trio_llm.params import SamplingParams, Submission

ONE = SamplingParams(max_tokens=1)


def ask(
    step: int,
    *,
    admits: tuple[Admit, ...] = (),
    rows: tuple[tuple[int, int, int], ...] = (),
    waiting: tuple[int, ...] = (),
    order: tuple[int, ...] | None = None,
    budget: int = 100,
    chunk: int = 100,
) -> BlockAsk:
    """Write an ask by hand; `rows` are (request_id, computed, end)."""
    ids, computed, ends = zip(*rows, strict=True) if rows else ((), (), ())
    nothing_new = ((),) * len(ids)
    order = ids if order is None else order
    return BlockAsk(step, (), (), admits, ids, computed, computed, ends, nothing_new, order, waiting, budget, chunk)


def test_a_decode_gets_a_block_when_its_last_one_is_full() -> None:
    """Blocks are added one at a time, at their place in the table, and nothing is said of rows that need none."""
    bench = Bench()
    bench.submit(1, 6)
    news = []
    for _ in range(4):
        plan = bench.plan()
        assert plan is not None
        news.append(plan.new_blocks[0])
        bench.commit(plan)
    assert news == [((0, (1, 2)),), (), (), ((2, (3,)),)]


def test_a_prompt_hits_the_full_blocks_of_one_that_began_alike() -> None:
    """Shared blocks stand first in the new table and have two owners; the rest is computed."""
    bench = Bench()
    bench.submit(1, unique(1, 10))
    bench.step()
    bench.submit(2, (*unique(1, 9), 77))
    plan = bench.plan()
    assert plan is not None
    assert (plan.starts[1], plan.counts[1]) == (8, 2)
    assert plan.new_blocks[1] == ((0, (1, 2, 4)),)
    states = bench.blocks.blocks()
    assert states[1].owners == ((1, 0, 0), (2, 0, 0))
    assert states[1].references == 2
    pool = bench.blocks.pool_map()
    assert pool.references == tuple(state.references for state in states)
    assert pool.cached == tuple(state.digest is not None for state in states)
    owners = [{owner for owner, _, _ in state.owners} or {0} for state in states]
    assert all(owner in known for owner, known in zip(pool.owners, owners, strict=True))
    assert pool.held == {1: 3, 2: 3}


def test_a_hit_on_blocks_in_use_costs_no_free_block() -> None:
    """A prompt that shares most of its blocks with a running sequence is admitted to the little room it needs."""
    bench = Bench(num_blocks=5, max_model_len=16)
    bench.submit(1, unique(1, 9))
    bench.step()
    bench.submit(2, unique(1, 9))
    assert bench.step() == {1: 1, 2: 1}


@pytest.mark.parametrize(("length", "hit"), [(8, 4), (9, 8), (7, 4), (4, 0), (5, 4)])
def test_one_token_of_a_prompt_is_always_computed(length: int, hit: int) -> None:
    """A prompt that is cached to the last token computes its last block again, for its logits."""
    bench = Bench()
    bench.submit(1, unique(1, 12), ONE)
    bench.step()
    bench.submit(2, unique(1, length))
    assert bench.step() == {2: length - hit}


def test_nothing_is_shared_before_it_is_computed() -> None:
    """Prompts admitted in one step compute the same blocks twice; both keep their own, one can be hit."""
    bench = Bench()
    bench.submit(1, unique(1, 8))
    bench.submit(2, unique(1, 8))
    assert bench.step() == {1: 8, 2: 8}
    bench.step()
    keys = [block.digest for block in bench.blocks.blocks() if block.digest]
    assert len(keys) == len(set(keys)) == 2
    assert all(block.references < 2 for block in bench.blocks.blocks())


def test_a_chunk_is_shared_as_soon_as_it_is_computed() -> None:
    """Others hit the computed part of a prompt that is still in progress, and not the part that is scheduled."""
    bench = Bench(max_num_batched_tokens=9, threshold=8)
    bench.submit(1, unique(1, 30))
    bench.step()
    bench.submit(2, unique(1, 30))
    bench.step()
    assert bench.grants[-1].starts == (8, 8)


def test_salts_keep_tenants_apart() -> None:
    """The same prompt under another salt is another prompt."""
    bench = Bench()
    prompt = unique(1, 9)
    bench.submit(1, prompt, ONE, salt=b"a")
    bench.step()
    bench.submit(2, prompt, ONE, salt=b"b")
    bench.submit(3, prompt, ONE)
    bench.submit(4, prompt, ONE, salt=b"a")
    assert bench.step() == {2: 9, 3: 9, 4: 1}


def test_a_block_is_known_by_all_that_stands_before_it() -> None:
    """Equal tokens behind another beginning are another block."""
    bench = Bench()
    bench.submit(1, (1, 2, 3, 4, 5, 6, 7, 8, 9), ONE)
    bench.step()
    bench.submit(2, (0, 2, 3, 4, 5, 6, 7, 8, 9), ONE)
    bench.submit(3, (5, 6, 7, 8, 5, 6, 7, 8, 9), ONE)
    assert bench.step() == {2: 9, 3: 9}


def test_the_secret_decides_the_keys() -> None:
    """Nobody who does not know the process's secret can tell which prompts would share a key."""
    keys = {Chain(secret, b"", (1, 2, 3, 4), 4).block(0, 4)[0] for secret in (b"one", b"two")}
    salted = {Chain(b"one", salt, (1, 2, 3, 4), 4).block(0, 4)[0] for salt in (b"", b"x", b"y")}
    assert len(keys | salted) == 4


def test_tokens_are_compared_on_a_hit() -> None:
    """Even if all digests were equal, no prompt would be served with the KV of another."""
    honest = Chain.block
    bench = Bench()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Chain, "block", lambda self, index, size: (b"same", honest(self, index, size)[1]))
        bench.submit(1, 9, ONE)
        bench.step()
        bench.submit(2, 9, ONE)
        assert bench.step() == {2: 9}
        bench.submit(3, unique(1, 5), ONE)
        assert bench.step() == {3: 1}


def test_a_sequence_frees_its_tail_first() -> None:
    """The beginning of a prompt, which others are likeliest to share, is evicted last."""
    bench = Bench(num_blocks=5)
    bench.submit(1, unique(1, 12), ONE)
    bench.step()
    bench.submit(2, 8, ONE)  # One empty block, then the least useful of the cached.
    bench.step()
    bench.submit(3, unique(1, 12), ONE)
    assert bench.step() == {3: 4}


def test_the_least_recently_released_is_evicted_first() -> None:
    """A prompt that was used again since outlives one that was not."""
    bench = Bench(num_blocks=5)
    bench.submit(1, 5, ONE)
    bench.submit(2, 5, ONE)
    bench.step()
    bench.submit(3, unique(1, 5), ONE)
    assert bench.step() == {3: 1}
    bench.submit(4, 12, ONE)
    bench.step()
    bench.submit(5, unique(1, 5), ONE)
    assert bench.step() == {5: 1}


def test_blocks_that_nobody_can_hit_are_used_before_cached_ones() -> None:
    """A half-filled tail is worth nothing, so it goes first, however recently it was released."""
    bench = Bench(num_blocks=4)
    bench.submit(1, 10, ONE)
    bench.step()
    bench.submit(2, 2, ONE)
    bench.step()
    assert bench.count("cached") == 2


def test_a_request_may_keep_out_of_the_cache() -> None:
    """Prompt logprobs need every position computed; what such a request computes is shared all the same."""
    blocks = BlockManager(num_blocks=20, groups=(KVGroup((0,), 4),), secret=b"")
    grant = blocks.reserve(ask(1, admits=(Admit(1, tuple(range(9)), read_cache=False),), waiting=(1,)))
    assert grant.starts == (0,)
    admits = (Admit(2, tuple(range(9)), read_cache=False), Admit(3, tuple(range(9))))
    grant = blocks.reserve(ask(2, admits=admits, rows=((1, 9, 10),), waiting=(2, 3)))
    assert grant.starts == (9, 0, 8)
    assert (grant.stats.queried_tokens, grant.stats.hit_tokens) == (9, 8)


def test_without_caching_nothing_is_kept() -> None:
    """The switch turns hits, keys and idle blocks off."""
    bench = Bench(caching=False)
    bench.submit(1, unique(1, 9), ONE)
    bench.step()
    bench.submit(2, unique(1, 9))
    assert bench.step() == {2: 9}
    assert bench.count("cached") == 0
    assert bench.grants[-1].stats.queried_tokens == 0


def test_a_preempted_sequence_finds_most_of_its_kv_again() -> None:
    """What it computed is still in the cache when it returns, its output included."""
    bench = Bench(num_blocks=8)
    bench.submit(1, 11)
    bench.submit(2, 7)
    for _ in range(20):
        bench.step()
        if bench.waiting() == [2]:
            break
    bench.scheduler.abort(1)
    shares = bench.step()
    assert 0 < bench.grants[-1].starts[0] == bench.scheduler.running[0].computed - shares[2]
    assert bench.grants[-1].stats.hit_tokens == 0  # Counted at the first admission only.


def test_a_victim_that_was_served_already_is_taken_out_again() -> None:
    """A decode got the block that an earlier prompt then needs: it loses all, and its token of the budget is free."""
    blocks = BlockManager(num_blocks=7, groups=(KVGroup((0,), 4),), secret=b"")
    admits = (Admit(1, unique(1, 12)), Admit(2, unique(2, 4)), Admit(3, unique(3, 8)))
    grant = blocks.reserve(ask(1, admits=admits, waiting=(1, 2, 3), chunk=4))
    assert grant.counts == (4, 4, 4)
    rows = ((2, 4, 5), (1, 4, 12), (3, 4, 8))
    grant = blocks.reserve(ask(2, rows=rows, order=(1, 3, 2), budget=9))
    assert grant.preempted == ()
    assert grant.counts == (1, 8)
    blocks = BlockManager(num_blocks=6, groups=(KVGroup((0,), 4),), secret=b"")
    blocks.reserve(ask(1, admits=(*admits[:2], Admit(3, unique(3, 4))), waiting=(1, 2, 3), chunk=3))
    rows = ((2, 3, 5), (1, 3, 12), (3, 3, 4))
    grant = blocks.reserve(ask(2, rows=rows, order=(1, 3, 2), budget=11))
    assert grant.preempted == (2,)
    assert (grant.request_ids, grant.starts, grant.counts) == ((1, 3), (3, 3), (9, 1))
    assert grant.new_blocks == (((1, (2, 4)),), ())
    assert blocks.tables(2) == ((),)


def test_a_row_that_is_last_in_line_preempts_itself() -> None:
    """If nobody stands behind it, the one that needs a block gives up its own."""
    blocks = BlockManager(num_blocks=3, groups=(KVGroup((0,), 4),), secret=b"")
    blocks.reserve(ask(1, admits=(Admit(1, unique(1, 4)), Admit(2, unique(2, 4))), waiting=(1, 2)))
    grant = blocks.reserve(ask(2, rows=((1, 3, 4), (2, 4, 5))))
    assert (grant.request_ids, grant.preempted) == ((1,), (2,))


def test_a_refused_prompt_is_not_looked_up_again_until_there_is_room() -> None:
    """Waiting costs nothing per step, however long the prompt that waits."""
    bench = Bench(num_blocks=17)
    bench.submit(1, 32)
    bench.step()
    bench.submit(2, 60)
    bench.step()
    looked_up: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench.blocks._pool, "find", lambda *args: looked_up.append(1) or 0)
        for _ in range(10):
            bench.step()
        assert not looked_up
        bench.scheduler.abort(1)
        bench.step()
        assert looked_up
    assert bench.running() == [2]


def test_a_refused_prompt_is_admitted_once_enough_of_it_is_cached() -> None:
    """It needs less with every block that another sequence computes for both; it does not wait for that one's end."""
    bench = Bench(num_blocks=21, threshold=16)
    bench.submit(1, unique(1, 49))
    bench.submit(2, (*unique(1, 48), 7))
    assert [bench.step() for _ in range(3)] == [{1: 16}, {1: 16}, {1: 16, 2: 16}]
    assert bench.grants[-1].starts == (32, 32)


def test_a_refused_prompt_is_admitted_once_others_hold_the_blocks_that_it_hits() -> None:
    """A cached block takes a free one while nobody uses it; it costs nothing from when another sequence shares it."""
    bench = Bench(num_blocks=17, policy="priority")
    prompt = unique(1, 32)
    bench.submit(1, prompt, ONE)
    bench.step()
    bench.submit(2, 25)
    bench.step()
    bench.step()
    bench.submit(3, (*prompt, 1, 2, 3, 4, 5), priority=1)
    assert bench.step() == {2: 1}
    bench.submit(4, (*prompt, 6))
    assert bench.step() == {2: 1, 4: 1}
    bench.scheduler.abort(2)
    assert bench.step() == {4: 1, 3: 5}


def test_the_null_block_is_never_handed_out() -> None:
    """Every block but block 0 can be in use at the same time."""
    blocks = BlockManager(num_blocks=5, groups=(KVGroup((0,), 4),), secret=b"")
    grant = blocks.reserve(ask(1, admits=(Admit(1, unique(1, 16)),), waiting=(1,)))
    assert sorted(grant.new_blocks[0][0][1]) == [1, 2, 3, 4]


@pytest.mark.parametrize(("num_blocks", "preempts"), [(6000, False), (2000, True)])
def test_256_rows_get_at_once_what_they_get_one_by_one(num_blocks: int, preempts: bool) -> None:
    """Serving all rows together is only faster: the same grants, and in the end the same blocks in the same order."""
    rng, groups = random.Random(7), (KVGroup((0,), 16), KVGroup((1,), 16, 40))
    together, one_by_one = [
        BlockManager(num_blocks=num_blocks, groups=groups, secret=b"", max_step_tokens=512) for _ in range(2)
    ]
    scheduler = Scheduler(max_num_batched_tokens=512, max_batch_size=256, max_model_len=200, eos_token_ids=(0,))
    for row in range(300):
        params = SamplingParams(max_tokens=rng.randrange(80, 100), ignore_eos=rng.random() < 0.9)
        scheduler.submit(row, Submission(unique(row % 200, rng.randrange(1, 90)), params))
    num_preempted, at_once, most = 0, 0, 0
    with (
        patch.object(one_by_one, "_serve_all", lambda *_: False),
        patch.object(together, "_serve_running", wraps=together._serve_running) as apart,
    ):
        while (ask := scheduler.ask()) is not None:
            apart.reset_mock()
            grant = together.reserve(ask)
            assert grant == one_by_one.reserve(ask)
            at_once += len(grant.request_ids) >= 100 and not apart.called
            most = max(most, len(grant.request_ids))
            num_preempted += len(grant.preempted)
            plan = scheduler.plan(grant)
            if plan is not None:
                tokens = [(rng.randrange(200),) if samples else () for samples in plan.samples]
                scheduler.commit(StepResult(plan.step, tuple(tokens)))
    assert at_once > 10
    assert preempts or most == 256
    assert (num_preempted > 0) == preempts
    assert together.blocks() == one_by_one.blocks()
    assert together._pool.eviction_order() == one_by_one._pool.eviction_order()
