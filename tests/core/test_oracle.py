"""Outputs equal those of an undisturbed run, whatever the scheduler and the block manager do."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from itertools import product

import pytest

from tests.core.hash_model import reference
from tests.core.loop import FULL, HYBRID, SLIDING, TWO_SIZES, VOCAB, Loop, prompt_of
from trio_llm.core.prompt_lookup import LookupSizes
from trio_llm.core.speculation import Speculation
from trio_llm.messages import Failed
from trio_llm.params import PoolingParams, SamplingParams

# Steps in flight, and whether the model runs them only when somebody waits; one at a time it makes no difference.
FLIGHTS = [(1, False), (2, False), (2, True)]
GROUPS = {"full": FULL, "sliding": SLIDING, "hybrid": HYBRID, "two sizes": TWO_SIZES}


def simulate(
    seed: int, loop: Loop, *, num_requests: int, aborts: float = 0.0, failures: float = 0.0, longest: int = 30
) -> None:
    """Drive a loop with seeded random traffic, faults included, until it is drained."""
    rng = random.Random(seed)
    live: list[int] = []
    while len(loop.clients) < num_requests or loop.busy:
        arriving = min(rng.randrange(3), num_requests - len(loop.clients))
        live.extend([_submit(rng, loop, longest) for _ in range(arriving)])

        def disturb() -> None:
            if live and rng.random() < aborts:
                loop.abort(rng.choice(live))

        disturb()
        failed = [rng.choice(live)] if live and rng.random() < failures else []
        loop.step(failed, before_plan=disturb, in_flight=disturb)
    loop.check_drained()


def _submit(rng: random.Random, loop: Loop, longest: int) -> int:
    length = rng.randrange(1, min(longest, loop.max_model_len - 1) + 1)
    prompt = prompt_of(length, seed=rng.randrange(3))
    if rng.random() < 0.3:
        prompt = (*prompt[:-1], rng.randrange(VOCAB))
    kind = rng.random()
    params = (
        PoolingParams()
        if kind < 0.1
        else SamplingParams(
            max_tokens=rng.randrange(1, 25),
            min_tokens=rng.randrange(2) * rng.randrange(6),
            ignore_eos=rng.random() < 0.5,
            stop_token_ids=(5,) if rng.random() < 0.3 else (),
            prompt_logprobs=1 if kind > 0.85 else None,
        )
    )
    if isinstance(params, SamplingParams) and params.max_tokens < params.min_tokens:
        params = SamplingParams(max_tokens=params.max_tokens)
    leader = rng.randrange(1, len(loop.clients) + 1) if loop.clients and rng.random() < 0.2 else None
    salt = rng.choice([b"", b"", b"tenant"])
    return loop.submit(prompt, params, salt=salt, priority=rng.randrange(3), leader=leader)


def test_every_combination_gives_the_undisturbed_output() -> None:
    """Cache, chunk size, batch size, pool size, kinds of attention groups and steps in flight never change a token."""
    combinations = product(GROUPS.values(), [True, False], [(1, 1), (7, 4), (16, 8), (200, 16)], [11, 64], FLIGHTS)
    for number, (groups, caching, (budget, batch), num_blocks, (depth, late)) in enumerate(combinations):
        sizes = {"num_blocks": num_blocks + 20 * (len(groups) - 1), "budget": budget, "max_batch_size": batch}
        loop = Loop(groups, caching=caching, depth=depth, late=late, **sizes)
        simulate(number, loop, num_requests=4 if budget == 1 else 9)


def test_pressure_forces_preemption_and_eviction_and_changes_nothing() -> None:
    """With a pool that is always full, sequences are preempted, blocks evicted, and every output is still right."""
    preempted = hits = 0
    for number, (groups, policy, (depth, late)) in enumerate(product(GROUPS.values(), ["fcfs", "priority"], FLIGHTS)):
        num_blocks = 12 if len(groups) == 1 else 24
        small = Loop(groups, num_blocks=num_blocks, policy=policy, threshold=5, depth=depth, late=late)
        simulate(number, small, num_requests=25)
        preempted += sum(stats.num_preempted for stats in small.stats)
        hits += sum(stats.blocks.hit_tokens for stats in small.stats)
    assert preempted > 100
    assert hits > 200


def test_a_limit_on_prompts_that_changes_from_step_to_step_changes_no_token() -> None:
    """However few prompt tokens a step may compute beside its decodes, all outputs are right and all requests end."""
    for number, (groups, (depth, late)) in enumerate(product(GROUPS.values(), FLIGHTS)):
        limits = partial(random.Random(number).choice, [None, 1, 2, 7, 100])
        speculation = Speculation(3, LookupSizes(1, 3)) if depth == 1 else None
        loop = Loop(
            groups, num_blocks=40, depth=depth, late=late, prompt_tokens=limits, speculation=speculation, caching=False
        )
        simulate(number, loop, num_requests=30, aborts=0.05)


def test_aborts_and_failures_hurt_nobody_else() -> None:
    """Clients that leave at any instant and rows that fail give back all they had; the others' outputs are right."""
    for number, (groups, (depth, late)) in enumerate(product(GROUPS.values(), FLIGHTS)):
        loop = Loop(groups, num_blocks=14 if len(groups) == 1 else 40, depth=depth, late=late)
        simulate(number, loop, num_requests=30, aborts=0.15, failures=0.1)
        assert any(client.aborted for client in loop.clients.values())


def test_an_end_at_every_token_and_an_abort_at_every_step_disturb_nobody() -> None:
    """With two steps in flight, one sequence ends or leaves at each position it can, beside one that goes on."""
    for number, (at, how) in enumerate(product(range(1, 16), ["stop", "length", "abort", "fail"])):
        loop = Loop(HYBRID, num_blocks=24, depth=2, late=number % 2 == 0, eos=())
        prompt = prompt_of(7, seed=number)
        output = reference(prompt, SamplingParams(max_tokens=16), HYBRID, VOCAB, (), 64)
        params = SamplingParams(max_tokens=at if how == "length" else 16)
        if how == "stop":
            params = SamplingParams(max_tokens=16, stop_token_ids=(output[at - 1],))
        ender, other = loop.submit(prompt, params), loop.submit(prompt_of(9), SamplingParams(max_tokens=16))
        for _ in range(at):
            loop.step()
        if how == "abort":
            loop.step(in_flight=partial(loop.abort, ender))
        elif how == "fail":
            loop.step([ender])
        loop.run()
        assert len(loop.clients[other].output) == 16
        assert (how == "fail") == any(isinstance(event, Failed) for event in loop.clients[ender].events)


def guesser(seed: int, right: float) -> Callable[[int], int]:
    """Return a draft model that is right so often."""
    rng = random.Random(seed)
    return lambda token: token if rng.random() < right else rng.randrange(VOCAB)


@pytest.mark.parametrize("right", [0.0, 0.6, 1.0])
def test_drafts_change_no_token(right: float) -> None:
    """Good and bad drafts, cut by budget, blocks, ends and preemptions, leave every output as it is without them."""
    drafted = accepted = preempted = hits = 0
    combinations = product(GROUPS.values(), [(11, 16, 8, 0), (64, 200, 16, 0), (14, 12, 6, 5)], [1, 5])
    for number, (groups, (num_blocks, budget, batch, threshold), most) in enumerate(combinations):
        depth, late = FLIGHTS[number % 3]
        loop = Loop(
            groups,
            num_blocks=num_blocks + depth * 10 * (len(groups) - 1),
            budget=budget,
            max_batch_size=batch,
            threshold=threshold,
            policy=["fcfs", "priority"][number % 2],
            caching=number % 5 != 4,
            depth=depth,
            late=late,
            speculation=Speculation(most, None),
            guess=guesser(number, right),
        )
        simulate(number, loop, num_requests=12, aborts=0.05, failures=0.03)
        drafted += sum(sum(stats.drafted) for stats in loop.stats)
        accepted += sum(sum(stats.accepted) for stats in loop.stats)
        preempted += sum(stats.num_preempted for stats in loop.stats)
        hits += sum(stats.blocks.hit_tokens for stats in loop.stats)
    assert drafted > 500
    assert preempted > 10
    assert hits > 50
    assert {0.0: accepted < 0.1 * drafted, 0.6: 0.1 < accepted / drafted < 0.9, 1.0: accepted > 0.9 * drafted}[right]


def test_drafts_that_are_looked_up_change_no_token() -> None:
    """Prompts in loops make the look-up guess all the time, mostly wrongly; the outputs are right all the same."""
    drafted = 0
    for number, groups in enumerate(GROUPS.values()):
        loop = Loop(groups, num_blocks=14 + 20 * (len(groups) - 1), speculation=Speculation(4, LookupSizes(1, 3)))
        for at in range(12):
            loop.submit(prompt_of(4, seed=at) * 4, SamplingParams(max_tokens=20, ignore_eos=at % 2 == 0))
        loop.run()
        simulate(number, loop, num_requests=30, aborts=0.05, failures=0.03)
        drafted += sum(sum(stats.drafted) for stats in loop.stats)
    assert drafted > 300
