"""Two steps in flight: what the second one may assume of the first, and what becomes of it when that was wrong."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from tests.core.bench import PLAIN, Bench, unique
from trio_llm.errors import OutOfOrderError
from trio_llm.messages import (
    UNKNOWN,
    Embedding,
    Finished,
    PromptLogprobs,
    Started,
    StepPlan,
    StepResult,
    TokenLogprobs,
    Tokens,
    Usage,
)
from trio_llm.model_info import KVGroup
from trio_llm.params import PoolingParams, SamplingParams


def planned(bench: Bench) -> StepPlan:
    """Plan a step that must have rows."""
    plan = bench.plan()
    assert plan is not None
    return plan


def drain(bench: Bench, commit: Callable[[StepPlan], None]) -> list[StepPlan]:
    """Keep two steps in flight until there is nothing left to do; return all that were planned."""
    plans: list[StepPlan] = []
    in_flight: list[StepPlan] = []
    while (plan := bench.plan()) is not None or in_flight:
        if plan is not None:
            plans.append(plan)
            in_flight.append(plan)
        if in_flight and (plan is None or len(in_flight) == 2):
            commit(in_flight.pop(0))
    return plans


def test_a_decode_is_planned_before_its_token_is_known() -> None:
    """The step after one in flight takes up the token that is being sampled, under the name UNKNOWN."""
    bench = Bench()
    bench.submit(1, 3)
    first, second = planned(bench), planned(bench)
    assert (second.starts, second.counts, second.token_ids, second.samples) == ((3,), (1,), (UNKNOWN,), (True,))
    bench.commit(first, {1: 11})
    third = planned(bench)
    assert (third.starts, third.token_ids) == ((4,), (UNKNOWN,))
    bench.commit(second, {1: 12})
    bench.commit(third, {1: 13})
    fourth = planned(bench)
    assert (fourth.starts, fourth.token_ids) == ((5,), (13,))
    assert [event.token_ids for event in bench.events[1][1:]] == [(11,), (12,), (13,)]


def test_a_prompt_goes_on_where_the_step_in_flight_will_end() -> None:
    """Chunks of a prompt follow each other without waiting, and only the last one samples."""
    bench = Bench(max_num_batched_tokens=8)
    bench.submit(1, 20)
    first, second = planned(bench), planned(bench)
    bench.commit(first)
    third = planned(bench)
    assert [(plan.starts, plan.counts, plan.samples) for plan in (first, second, third)] == [
        ((0,), (8,), (False,)),
        ((8,), (8,), (False,)),
        ((16,), (4,), (True,)),
    ]


def test_a_third_step_is_not_planned() -> None:
    """The runner keeps the tokens of one step before: with two in flight the core refuses to be asked."""
    bench = Bench()
    bench.submit(1, 3)
    planned(bench)
    planned(bench)
    with pytest.raises(OutOfOrderError, match="two steps"):
        bench.scheduler.ask()


def test_an_end_by_length_is_known_beforehand() -> None:
    """Whoever gets its last token in the step in flight has no row in the next, and nobody is asked for nothing."""
    bench = Bench()
    bench.submit(1, 3, SamplingParams(max_tokens=2))
    bench.submit(2, 3, SamplingParams(max_tokens=3))
    first, second = planned(bench), planned(bench)
    assert second.request_ids == (1, 2)
    bench.commit(first)
    third = planned(bench)
    assert third.request_ids == (2,)
    assert bench.asks[-1].request_ids == (2, 1)
    assert bench.asks[-1].computed == (3, 3)
    assert bench.asks[-1].starts == (4, 4)
    assert bench.asks[-1].ends == (5, 4)
    bench.commit(second)
    assert bench.last(1) == Finished("length", Usage(3, 2, 0))
    assert bench.plan() is None
    assert bench.asks[-1].released == (1,)
    assert bench.scheduler.ask() is None
    assert bench.running() == [2]
    bench.commit(third)
    assert bench.last(2) == Finished("length", Usage(3, 3, 0))


def test_the_end_of_the_context_is_known_beforehand_too() -> None:
    """No row is planned for a position that max_model_len rules out."""
    bench = Bench(max_model_len=5)
    bench.submit(1, 3, SamplingParams(max_tokens=None))
    first, second = planned(bench), planned(bench)
    bench.commit(first)
    assert bench.plan() is None
    bench.commit(second)
    assert bench.last(1) == Finished("length", Usage(3, 2, 0))


@pytest.mark.parametrize("at", range(1, 6))
def test_a_stop_token_wastes_one_row(at: int) -> None:
    """What the step after the last token computes is dropped: no event, no count, and its blocks are free at once."""
    bench = Bench()
    bench.submit(1, 3)
    plans = [planned(bench)]
    for number in range(1, at + 1):
        plans.append(planned(bench))
        bench.commit(plans[-2], {1: 0 if number == at else PLAIN})
    assert bench.last(1) == Finished("stop", Usage(3, at, 0))
    assert plans[-1].request_ids == (1,)
    told = list(bench.events[1])
    assert bench.plan() is None
    assert bench.count("used") == 0
    assert bench.scheduler.take_ended() == (1,)
    bench.commit(plans[-1], {1: 5})
    assert bench.events[1] == told
    assert bench.commits[-1].stats.num_generated_tokens == 0
    assert bench.ask() is None


def test_a_text_to_embed_has_no_row_after_its_last() -> None:
    """A vector needs no token: while it is computed there is nothing to ask for."""
    bench = Bench(max_num_batched_tokens=8)
    bench.submit(1, 12, PoolingParams())
    first, second = planned(bench), planned(bench)
    assert second.samples == (True,)
    bench.commit(first)
    assert bench.scheduler.ask() is None
    bench.commit(second)
    assert bench.events[1][1:] == [Embedding((1.0,)), Finished("stop", Usage(12, 0, 0))]


def test_what_is_in_flight_is_not_shared() -> None:
    """A prompt hits the blocks of another only when the step that computes them was committed."""
    bench = Bench()
    prompt = unique(1, 12)
    bench.submit(1, prompt)
    first = planned(bench)
    bench.submit(2, prompt)
    assert planned(bench).starts == (12, 0)
    bench.commit(first)
    bench.submit(3, prompt)
    third = planned(bench)
    assert third.starts[third.request_ids.index(3)] == 8


def test_followers_wait_for_the_commit() -> None:
    """Samples of one prompt start when it is in the cache, not when it is planned."""
    bench = Bench()
    prompt = unique(1, 12)
    bench.submit(1, prompt)
    bench.submit(2, prompt, leader=1)
    first = planned(bench)
    assert planned(bench).request_ids == (1,)
    bench.commit(first)
    third = planned(bench)
    assert (third.request_ids, third.starts) == ((1, 2), (13, 8))


def two_of_which_one_is_preempted(**options: int) -> tuple[Bench, StepPlan, StepPlan]:
    """Return a bench on which 2 lost its blocks while its decode was in flight, that step, and the one planned then."""
    bench = Bench(num_blocks=5, caching=False)
    bench.submit(1, 7)
    bench.submit(2, 7, SamplingParams(**options))
    bench.commit(planned(bench), {1: 11, 2: 21})
    second = planned(bench)
    third = planned(bench)
    assert bench.grants[-1].preempted == (2,)
    return bench, second, third


def test_a_preemption_that_leaves_no_row_to_plan_is_counted() -> None:
    """Who loses its blocks while all others end with the step in flight is in the numbers of that step."""
    bench = Bench(num_blocks=5, caching=False)
    bench.submit(1, 7, SamplingParams(max_tokens=2))
    bench.submit(2, 7, SamplingParams(max_tokens=3))
    bench.step()
    second = planned(bench)
    assert bench.plan() is None
    assert bench.grants[-1].preempted == (2,)
    bench.commit(second)
    while bench.step():
        pass
    assert [commit.stats.num_preempted for commit in bench.commits] == [0, 1, 0, 0]


def test_a_preemption_forgets_the_step_in_flight() -> None:
    """What was sampled for a sequence that lost its blocks meanwhile is not told, and computed again later."""
    bench, second, third = two_of_which_one_is_preempted(max_tokens=3)
    assert second.request_ids == (1, 2)
    assert (third.request_ids, third.dropped) == ((1,), (2,))
    bench.commit(second, {1: 12, 2: 22})
    bench.commit(third, {1: 0})
    assert bench.events[2] == [Started(0), Tokens((21,))]
    fourth = planned(bench)
    assert (fourth.request_ids, fourth.token_ids) == ((2,), (*unique(2, 7), 21))
    bench.commit(fourth, {2: 22})
    bench.step({2: 23})
    assert [type(event) for event in bench.events[2]] == [Started, Tokens, Tokens, Tokens, Finished]
    assert bench.last(2) == Finished("length", Usage(7, 3, 0))


def test_a_failure_of_a_step_that_was_forgotten_is_forgotten() -> None:
    """A preempted sequence fails when its new computation fails, not for the one that nobody waits for."""
    bench, second, third = two_of_which_one_is_preempted(max_tokens=3)
    bench.commit(second, {1: 12}, failed={2: "bad"})
    bench.commit(third, {1: 0})
    assert bench.step({2: 22}) == {2: 8}
    assert bench.last(2) == Tokens((22,))


def test_a_prompt_preempted_in_flight_starts_once() -> None:
    """Whoever loses its blocks before its first step is committed hears Started later, with what it first hit."""
    bench = Bench(num_blocks=8)
    cached = unique(2, 9)
    bench.submit(9, cached, SamplingParams(max_tokens=1))
    bench.step()
    bench.submit(1, 15)
    bench.step()
    bench.submit(2, cached, SamplingParams(max_tokens=2))
    second = planned(bench)
    assert second.request_ids == (1, 2)
    third = planned(bench)
    assert bench.grants[-1].preempted == (2,)
    bench.commit(second)
    assert 2 not in bench.events
    bench.commit(third, {1: 0})
    while bench.step():
        pass
    assert [type(event) for event in bench.events[2]] == [Started, Tokens, Tokens, Finished]
    assert bench.events[2][0] == Started(8)
    assert bench.last(2) == Finished("length", Usage(9, 2, 8))


def test_prompt_logprobs_of_a_forgotten_step_are_not_counted_twice() -> None:
    """A prompt that starts over while a chunk is in flight gathers each position once."""
    bench = Bench(num_blocks=9, max_num_batched_tokens=9, threshold=8, caching=False)
    bench.submit(1, 15)
    for _ in range(2):
        bench.step()
    bench.submit(2, 16, SamplingParams(max_tokens=1, prompt_logprobs=0))
    drain(bench, partial(_commit_scored, bench))
    scored = [event for event in bench.events[2] if isinstance(event, PromptLogprobs)]
    assert any(grant.preempted for grant in bench.grants)
    assert [len(event.entries) for event in scored] == [16]


def _commit_scored(bench: Bench, plan: StepPlan) -> None:
    entries = {
        request_id: tuple(TokenLogprobs(at, 0.0, 1, ()) if at else None for at in range(start, start + count))
        for request_id, start, count in zip(plan.request_ids, plan.starts, plan.counts, strict=True)
    }
    sampled = tuple((PLAIN,) if samples else () for samples in plan.samples)
    for request_id, event in bench.scheduler.commit(StepResult(plan.step, sampled, prompt_logprobs=entries)).events:
        bench.events.setdefault(request_id, []).append(event)


def test_whoever_was_preempted_comes_back_only_where_it_gets_further() -> None:
    """The token in flight is lost with the blocks: with room for the known ones alone it would be lost again."""
    bench, second, third = two_of_which_one_is_preempted(max_tokens=9)
    assert bench.waiting() == [2]
    bench.commit(second, {1: 12, 2: 22})
    fourth = planned(bench)
    bench.commit(third, {1: 13})
    assert fourth.request_ids == (1,)
    assert bench.waiting() == [2]


def test_a_sequence_that_preempts_itself_is_not_admitted_under_its_step_in_flight() -> None:
    """Alone in need of a block that nobody has, it waits until others are done instead of going round in circles."""
    bench = Bench(num_blocks=5, caching=False)
    bench.submit(1, 6, SamplingParams(max_tokens=8))
    bench.submit(2, 8, SamplingParams(max_tokens=8))
    plans = drain(bench, bench.commit)
    assert bench.last(2) == Finished("length", Usage(8, 8, 0))
    assert sum([2 in [admission.request_id for admission in plan.admitted] for plan in plans]) == 2


@pytest.mark.parametrize("alone", [True, False])
def test_what_leaves_a_window_was_offered_to_the_cache_before(alone: bool) -> None:
    """A chunk longer than the window keeps its blocks until its step is committed, so later prompts can hit them.

    Beside a decode, which takes of the budget, rows are served one by one.
    """
    bench = Bench((KVGroup((0,), 4, 4),), max_num_batched_tokens=16, depth=2)
    prompt = unique(1, 40)
    if not alone:
        bench.submit(3, 1, SamplingParams(max_tokens=9))
        bench.commit(planned(bench))
    bench.submit(1, prompt, SamplingParams(max_tokens=1))
    plans = [planned(bench)]
    for _ in range(2):
        plans.append(planned(bench))
        bench.commit(plans[-2])
    bench.commit(plans[-1])
    bench.submit(2, (*prompt[:8], 7, 7, 7))
    plan = planned(bench)
    assert plan.starts[plan.request_ids.index(2)] == 8


def test_an_abort_in_flight_keeps_what_was_committed_only() -> None:
    """The blocks of the steps in flight are given back unshared: who knows whether those steps fail."""
    bench = Bench(max_num_batched_tokens=8)
    prompt = unique(1, 30)
    bench.submit(1, prompt)
    first, second = planned(bench), planned(bench)
    bench.commit(first)
    bench.scheduler.abort(1)
    bench.submit(2, prompt)
    assert planned(bench).starts == (8,)
    bench.commit(second, failed={1: "bad"})
    bench.submit(3, prompt)
    assert bench.count("cached") + bench.count("used") > 0
    assert 1 in bench.events
    assert [type(event) for event in bench.events[1]] == [Started]


def test_an_abort_of_one_that_is_being_preempted_shares_nothing_it_lost() -> None:
    """Its blocks went with the grant; what its step in flight yields later cannot be offered any more."""
    bench = Bench(num_blocks=5)
    bench.submit(1, 7)
    bench.submit(2, 7)
    bench.commit(planned(bench))
    second = planned(bench)
    ask = bench.ask()
    assert ask is not None
    grant = bench.reserve(ask)
    assert grant.preempted == (2,)
    bench.scheduler.abort(2)
    third = bench.scheduler.plan(grant)
    assert third is not None
    bench.commit(second)
    fourth = planned(bench)
    assert bench.scheduler.take_ended() == (2,)
    bench.commit(third)
    bench.commit(fourth)
    assert {owner for block in bench.blocks.blocks() for owner, _, _ in block.owners} == {1}


def test_two_commits_in_a_row_share_only_tokens_that_were_told() -> None:
    """The cache hears of tokens with the asks; what ended before the next one is shared as far as it knows them."""
    bench = Bench()
    bench.submit(1, 6, SamplingParams(max_tokens=3))
    bench.commit(planned(bench), {1: 51})
    second, third = planned(bench), planned(bench)
    bench.commit(second, {1: 52})
    assert bench.scheduler.ask() is None
    bench.commit(third, {1: 53})
    assert bench.plan() is None
    assert bench.asks[-1].released_computed == (7,)
    bench.submit(2, (*unique(1, 6), 51, 52, 53, 54))
    assert planned(bench).starts == (4,)
