"""Golden scenarios: who runs in which step, with how many tokens."""

from __future__ import annotations

import pytest

from tests.core.bench import PLAIN, Bench, unique
from trio_llm.errors import InvalidRequestError
from trio_llm.params import PoolingParams, SamplingParams


def test_decodes_come_first_and_prefill_fills_the_rest_of_the_same_batch() -> None:
    """A step serves every decode, then a chunk of the newcomer's prompt with what is left of the budget."""
    bench = Bench(max_num_batched_tokens=10)
    bench.submit(1, 3)
    bench.submit(2, 4)
    assert bench.step() == {1: 3, 2: 4}
    bench.submit(3, 20)
    plan = bench.plan()
    assert plan is not None
    assert plan.request_ids == (1, 2, 3)
    assert plan.counts == (1, 1, 8)
    assert plan.starts == (3, 4, 0)
    assert plan.samples == (True, True, False)
    assert plan.token_ids == (PLAIN, PLAIN, *unique(3, 20)[:8])


def test_a_long_prompt_is_cut_into_chunks_of_the_budget() -> None:
    """Only the last chunk of a prompt samples a token."""
    bench = Bench(max_num_batched_tokens=8)
    bench.submit(1, 20)
    samples = []
    for _ in range(4):
        plan = bench.plan()
        assert plan is not None
        samples.append((plan.counts, plan.samples))
        bench.commit(plan)
    assert samples == [((8,), (False,)), ((8,), (False,)), ((4,), (True,)), ((1,), (True,))]


def test_the_threshold_leaves_room_for_other_prompts() -> None:
    """With a prefill threshold no prompt takes a step for itself, neither when admitted nor later."""
    bench = Bench(max_num_batched_tokens=10, threshold=4)
    for request_id in (1, 2, 3):
        bench.submit(request_id, 9)
    assert bench.step() == {1: 4, 2: 4, 3: 2}
    assert bench.step() == {1: 4, 2: 4, 3: 2}
    assert bench.step() == {1: 1, 2: 1, 3: 4}


def test_a_decode_is_served_before_an_earlier_prefill() -> None:
    """A prompt in chunks does not hold up those that already stream, wherever they stand in the policy's order."""
    bench = Bench(max_num_batched_tokens=8, threshold=6)
    bench.submit(1, 30)
    bench.submit(2, 2)
    assert bench.step() == {1: 6, 2: 2}
    plan = bench.plan()
    assert plan is not None
    assert plan.request_ids == (2, 1)


def test_no_more_sequences_run_than_allowed() -> None:
    """The batch size limits the running sequences, not just the rows of a step."""
    bench = Bench(max_batch_size=2)
    for request_id in (1, 2, 3):
        bench.submit(request_id, 2, SamplingParams(max_tokens=2))
    assert list(bench.step()) == [1, 2]
    assert list(bench.step()) == [1, 2]
    assert list(bench.step()) == [3]


def test_a_budget_below_the_batch_serves_the_earliest() -> None:
    """Decodes beyond the budget wait for the next step instead of breaking it."""
    bench = Bench(max_num_batched_tokens=2)
    for request_id in (1, 2, 3):
        bench.submit(request_id, 1, SamplingParams(max_tokens=3))
    assert list(bench.step()) == [1, 2]
    assert list(bench.step()) == [1, 2]
    assert list(bench.step()) == [1, 2]
    assert list(bench.step()) == [3]


def test_a_request_without_blocks_stops_admission() -> None:
    """The head of the queue is never overtaken by a smaller request that would fit."""
    bench = Bench(num_blocks=9)  # Eight blocks of four tokens.
    bench.submit(1, 16, SamplingParams(max_tokens=2))
    bench.submit(2, 24)
    bench.submit(3, 1)
    assert bench.step() == {1: 16}
    assert bench.waiting() == [2, 3]
    assert bench.step() == {1: 1}
    assert bench.step() == {2: 24, 3: 1}


def test_admission_demands_blocks_for_the_whole_prompt() -> None:
    """A prompt is not begun when only its first chunk would fit, which would end in preemption."""
    bench = Bench(num_blocks=9, max_num_batched_tokens=8)
    bench.submit(1, 8)
    assert bench.step() == {1: 8}
    bench.submit(2, 28)
    assert bench.step() == {1: 1}
    assert bench.waiting() == [2]


def test_prompts_in_progress_keep_the_blocks_that_they_were_promised() -> None:
    """Two prompts that fit one at a time are not admitted together because neither has taken all its blocks yet."""
    bench = Bench(num_blocks=9, threshold=4)
    bench.submit(1, 20, SamplingParams(max_tokens=1))
    bench.submit(2, 16, SamplingParams(max_tokens=1))
    for _ in range(5):
        assert bench.step() == {1: 4}
    assert bench.step() == {2: 4}
    assert all(not grant.preempted for grant in bench.grants)


def test_the_last_in_line_is_preempted_and_comes_back_first() -> None:
    """Out of blocks, the latest arrival loses its own, nobody is admitted in that step, and it leads the queue."""
    bench = Bench(num_blocks=5, caching=False)
    bench.submit(1, 7)
    bench.submit(2, 7)
    assert bench.step({1: 11, 2: 21}) == {1: 7, 2: 7}
    bench.submit(3, 1)
    assert bench.step({1: 12, 2: 22}) == {1: 1, 2: 1}
    plan = bench.plan()
    assert plan is not None
    assert plan.request_ids == (1,)
    assert plan.dropped == (2,)
    assert bench.grants[-1].preempted == (2,)
    assert bench.waiting() == [2, 3]
    bench.commit(plan, {1: 0})
    plan = bench.plan()
    assert plan is not None
    assert [admission.request_id for admission in plan.admitted] == [2, 3]
    assert plan.admitted[0].token_ids == (*unique(2, 7), 21, 22)
    assert plan.admitted[0].num_prompt_tokens == 7
    assert (plan.starts[0], plan.counts[0], plan.samples[0]) == (0, 9, True)


def test_priority_orders_admission_and_picks_the_victim() -> None:
    """Smaller numbers go first, ties by arrival; the victim is the last in that order, not the last admitted."""
    bench = Bench(policy="priority", max_batch_size=2, num_blocks=5, caching=False)
    bench.submit(1, 7, priority=5)
    assert bench.step() == {1: 7}
    bench.submit(2, 7, priority=9)
    bench.submit(3, 7, priority=1)
    bench.submit(4, 1, priority=1)
    assert bench.waiting() == [3, 4, 2]
    assert bench.step() == {1: 1, 3: 7}
    assert bench.step() == {3: 1}
    assert bench.grants[-1].preempted == (1,)
    assert bench.waiting() == [4, 1, 2]


def test_fcfs_ignores_priorities() -> None:
    """Without the priority policy the number means nothing."""
    bench = Bench()
    bench.submit(1, 1, priority=5)
    bench.submit(2, 1, priority=-5)
    assert bench.waiting() == [1, 2]


def test_followers_wait_for_their_leaders_prompt_and_hit_it() -> None:
    """Samples of one prompt compute it once, and those behind them are not held up."""
    bench = Bench(max_num_batched_tokens=8)
    prompt = unique(1, 12)
    bench.submit(1, prompt)
    bench.submit(2, prompt, leader=1)
    bench.submit(3, 2)
    assert bench.scheduler.num_waiting == 3
    assert bench.step() == {1: 8}
    assert bench.waiting() == [3]
    assert bench.step() == {1: 4, 3: 2}
    assert bench.step() == {1: 1, 3: 1, 2: 4}
    assert bench.grants[-1].stats.hit_tokens == 8


def test_followers_are_freed_when_their_leader_ends_before_its_prompt_does() -> None:
    """An aborted or unknown leader holds nobody."""
    bench = Bench()
    bench.submit(1, 12)
    bench.submit(2, 12, leader=1)
    bench.submit(3, 12, leader=2)
    bench.submit(4, 12, leader=77)
    assert bench.waiting() == [1, 4]
    bench.scheduler.abort(1)
    assert bench.waiting() == [2, 4]
    bench.scheduler.abort(2)
    assert bench.waiting() == [3, 4]
    bench.scheduler.abort(3)
    bench.scheduler.abort(4)
    assert bench.ask() is None
    assert sorted(bench.scheduler.take_ended()) == [1, 2, 3, 4]


def test_a_held_follower_can_leave() -> None:
    """Aborting a follower takes it out of its leader's line for good."""
    bench = Bench()
    bench.submit(1, 4)
    bench.submit(2, 4, leader=1)
    bench.scheduler.abort(2)
    assert bench.scheduler.num_waiting == 1
    bench.step()
    assert bench.waiting() == []


def test_a_leader_that_was_preempted_still_leads_nobody_who_comes_later() -> None:
    """Once a prompt was computed its followers start at once, even while the leader itself has to compute it again."""
    bench = Bench(num_blocks=5, caching=False)
    bench.submit(1, 7)
    bench.submit(2, 7)
    for _ in range(3):
        bench.step()
    assert bench.waiting() == [2]
    bench.submit(3, 7, leader=2)
    assert bench.waiting() == [2, 3]


@pytest.mark.parametrize(("length", "params"), [(0, SamplingParams()), (64, SamplingParams()), (65, PoolingParams())])
def test_a_prompt_that_cannot_fit_is_refused_and_changes_nothing(
    length: int, params: SamplingParams | PoolingParams
) -> None:
    """Empty prompts, and those that leave no room for output, are the client's mistake."""
    bench = Bench()
    with pytest.raises(InvalidRequestError) as caught:
        bench.submit(1, length, params)
    assert caught.value.param == "prompt"
    assert str(length) in str(caught.value) or length == 0
    assert bench.ask() is None
    bench.submit(1, 1)
    assert bench.scheduler.waiting[0].key == (0, 1)


def test_the_longest_prompts_are_accepted() -> None:
    """A prompt may fill all but one position, a text to embed all of them."""
    bench = Bench(max_num_batched_tokens=64)
    bench.submit(1, 63)
    bench.submit(2, 64, PoolingParams())
    bench.step()
    bench.step()
    assert not bench.running()


def test_nothing_to_do_asks_for_nothing() -> None:
    """An idle scheduler has no ask, and a step that only hands back blocks has no plan."""
    bench = Bench()
    assert bench.ask() is None
    bench.submit(1, 3, SamplingParams(max_tokens=1))
    bench.step()
    ask = bench.ask()
    assert ask is not None
    assert (ask.released, ask.released_computed, ask.request_ids) == ((1,), (3,), ())
    assert bench.scheduler.take_ended() == ()
    assert bench.scheduler.plan(bench.reserve(ask)) is None
    assert bench.scheduler.take_ended() == (1,)
    assert bench.ask() is None


def test_prompts_travel_once_and_tokens_as_increments() -> None:
    """The KV manager hears a prompt when it first waits for blocks, and then only what was sampled since."""
    bench = Bench(num_blocks=9)
    bench.submit(1, 16)
    bench.submit(2, 24)
    bench.step({1: 31})
    bench.step({1: 32})
    bench.step({1: 33})
    assert [[admit.request_id for admit in ask.admits] for ask in bench.asks] == [[1, 2], [], []]
    assert [ask.new_token_ids for ask in bench.asks] == [(), ((31,),), ((32,),)]
    assert [ask.waiting for ask in bench.asks] == [(1, 2), (2,), (2,)]


def test_the_runner_hears_once_of_each_that_is_gone() -> None:
    """Dropped sequences stand in the next plan there is, and never again."""
    bench = Bench()
    bench.submit(1, 3, SamplingParams(max_tokens=1))
    bench.step()
    assert bench.plan() is None
    bench.submit(2, 3)
    plan = bench.plan()
    assert plan is not None
    assert plan.dropped == (1,)
    bench.commit(plan)
    plan = bench.plan()
    assert plan is not None
    assert plan.dropped == ()


def test_the_numbers_of_a_step_are_true() -> None:
    """Rows, tokens, prefill and generated tokens, queues and preemptions are reported as they were."""
    bench = Bench(max_num_batched_tokens=8, max_batch_size=2)
    bench.submit(1, 2)
    bench.step()
    bench.submit(2, 20)
    bench.submit(3, 20)
    bench.step()
    stats = bench.commits[-1].stats
    assert (stats.step, stats.num_rows, stats.num_tokens) == (2, 2, 8)
    assert (stats.num_prefill_tokens, stats.num_generated_tokens) == (7, 1)
    assert (stats.num_running, stats.num_waiting, stats.num_preempted) == (2, 1, 0)
    assert stats.blocks.used_blocks == (3,)
    assert stats.blocks.queried_tokens == 20


def test_the_same_calls_give_the_same_plans() -> None:
    """Nothing in the core depends on chance, time or hash seeds."""

    def plans() -> list[object]:
        bench = Bench(num_blocks=12, max_num_batched_tokens=7)
        said: list[object] = []
        for request_id in range(1, 6):
            bench.submit(request_id, 3 * request_id, SamplingParams(max_tokens=9))
        while (plan := bench.plan()) is not None:
            said.append(plan)
            bench.commit(plan)
        return said

    assert plans() == plans()


def test_representations_tell_the_story() -> None:
    """What a notebook prints says who runs and how far it is."""
    bench = Bench()
    bench.submit(7, 5)
    bench.submit(8, 5, leader=7)
    assert repr(bench.scheduler) == "<Scheduler at step 0: 0 running, 1 waiting, 1 held>"
    bench.step()
    assert repr(bench.scheduler.running[0]) == "<Sequence 7 running: prompt 5 + output 1, 5 computed>"
    assert repr(bench.blocks) == "<BlockManager: 63 blocks, 2 used by 1 sequences, 0 cached, 61 empty>"
