"""What a step's result means: when sequences end, what their clients hear, and what is dropped."""

from __future__ import annotations

import pytest

from tests.core.bench import PLAIN, Bench, unique
from trio_llm.errors import RequestFailedError
from trio_llm.messages import (
    Embedding,
    Failed,
    Finished,
    PromptLogprobs,
    Started,
    StepResult,
    TokenLogprobs,
    Tokens,
    Usage,
)
from trio_llm.params import PoolingParams, SamplingParams


@pytest.mark.parametrize(
    ("params", "tokens", "reason", "named"),
    [
        (SamplingParams(), [PLAIN, 0], "stop", None),
        (SamplingParams(), [PLAIN, 2], "stop", 2),
        (SamplingParams(stop_token_ids=(7,)), [7], "stop", 7),
        (SamplingParams(stop_token_ids=(0,)), [0], "stop", None),
        (SamplingParams(stop_token_ids=(0,), ignore_eos=True), [2, 0], "stop", 0),
        (SamplingParams(ignore_eos=True, max_tokens=3), [0, 2, 0], "length", None),
        (SamplingParams(min_tokens=2), [0, 0], "stop", None),
        (SamplingParams(min_tokens=3, stop_token_ids=(7,)), [7, 0, 7], "stop", 7),
        (SamplingParams(max_tokens=1), [PLAIN], "length", None),
        (SamplingParams(max_tokens=1), [0], "stop", None),
        (SamplingParams(max_tokens=None), [PLAIN] * 5, "length", None),
        (SamplingParams(max_tokens=None, min_tokens=9), [0] * 5, "length", None),
    ],
)
def test_a_sequence_ends_for_the_right_reason(
    params: SamplingParams, tokens: list[int], reason: str, named: int | None
) -> None:
    """End-of-sequence ids, stop ids, max_tokens and the context's end, with min_tokens holding the first two back."""
    bench = Bench(eos=(0, 2), max_model_len=8)
    bench.submit(1, 3, params)
    for token in tokens:
        assert not any(isinstance(event, Finished) for event in bench.events.get(1, []))
        bench.step({1: token})
    assert bench.last(1) == Finished(reason, Usage(3, len(tokens), 0), named)
    assert bench.scheduler.num_running == 0


def test_events_come_in_order_with_the_tokens_logprobs() -> None:
    """Started, then each row's token with its own logprobs, then the ends; all in the order of the rows."""
    bench = Bench()
    bench.submit(1, 3, SamplingParams(max_tokens=1, logprobs=0))
    bench.submit(2, 3)
    plan = bench.plan()
    assert plan is not None
    entry = TokenLogprobs(5, -0.5, 1, ())
    commit = bench.scheduler.commit(StepResult(plan.step, ((5,), (6,)), logprobs=((entry,), None)))
    assert commit.events == (
        (1, Started(0)),
        (2, Started(0)),
        (1, Tokens((5,), (entry,))),
        (2, Tokens((6,))),
        (1, Finished("length", Usage(3, 1, 0))),
    )


def test_started_says_once_what_the_cache_held() -> None:
    """The first admission's hit is reported, at the start and in the usage, and a resumption reports nothing new."""
    bench = Bench(num_blocks=8)
    prompt = unique(1, 9)
    bench.submit(1, prompt, SamplingParams(max_tokens=1))
    bench.step()
    bench.submit(2, 12)
    bench.submit(3, prompt, SamplingParams(max_tokens=5))
    while bench.scheduler.num_running + bench.scheduler.num_waiting:
        bench.step({2: PLAIN})
    assert sum(len(grant.preempted) for grant in bench.grants) > 0
    assert [event for event in bench.events[3] if isinstance(event, Started)] == [Started(8)]
    assert bench.last(3) == Finished("length", Usage(9, 5, 8))


def test_a_text_to_embed_ends_with_its_vector() -> None:
    """Pooling rows sample nothing, never read the cache, and end when the last chunk is computed."""
    bench = Bench(max_num_batched_tokens=8)
    bench.submit(1, 12, PoolingParams())
    assert bench.step() == {1: 8}
    assert bench.events[1] == [Started(0)]
    assert bench.step() == {1: 4}
    assert bench.events[1] == [Started(0), Embedding((1.0,)), Finished("stop", Usage(12, 0, 0))]
    bench.submit(2, unique(1, 12), PoolingParams())
    assert bench.step() == {2: 8}
    assert bench.grants[-1].starts == (0,)
    assert bench.grants[-1].stats.queried_tokens == 0


def _score(bench: Bench, chunks: int) -> None:
    for _ in range(chunks):
        plan = bench.plan()
        assert plan is not None
        entries = {
            request_id: tuple(TokenLogprobs(at, 0.0, 1, ()) if at else None for at in range(start, start + count))
            for request_id, start, count in zip(plan.request_ids, plan.starts, plan.counts, strict=True)
        }
        sampled = tuple((PLAIN,) if samples else () for samples in plan.samples)
        commit = bench.scheduler.commit(StepResult(plan.step, sampled, prompt_logprobs=entries))
        for request_id, event in commit.events:
            bench.events.setdefault(request_id, []).append(event)


def test_prompt_logprobs_come_whole_before_the_first_token() -> None:
    """Chunks are gathered and sent once; cached blocks are not used, because they would leave positions out."""
    bench = Bench(max_num_batched_tokens=8)
    bench.submit(1, 12, SamplingParams(max_tokens=1))
    bench.step()
    bench.step()
    bench.submit(2, unique(1, 12), SamplingParams(max_tokens=1, prompt_logprobs=0))
    _score(bench, 2)
    kinds = [type(event) for event in bench.events[2]]
    assert kinds == [Started, PromptLogprobs, Tokens, Finished]
    entries = bench.events[2][1].entries
    assert entries[0] is None
    assert [entry.token_id for entry in entries[1:]] == list(range(1, 12))


def test_prompt_logprobs_survive_a_preemption_of_the_prompt() -> None:
    """A prompt that starts over gathers its logprobs anew: each position once."""
    bench = Bench(num_blocks=9, max_num_batched_tokens=9, threshold=8, caching=False)
    bench.submit(1, 11, SamplingParams(max_tokens=30))
    _score(bench, 2)
    bench.submit(2, 20, SamplingParams(max_tokens=1, prompt_logprobs=0))
    _score(bench, 1)
    assert bench.running() == [1, 2]
    for _ in range(60):
        if bench.scheduler.num_running + bench.scheduler.num_waiting == 0:
            break
        _score(bench, 1)
    scored = [event for event in bench.events[2] if isinstance(event, PromptLogprobs)]
    assert len(scored) == 1
    assert len(scored[0].entries) == 20


def test_a_row_that_fails_fails_alone() -> None:
    """The others of the step go on, and what the failed one computed can be hit by nobody."""
    bench = Bench()
    prompt = unique(1, 12)
    bench.submit(1, prompt)
    bench.submit(2, 5)
    bench.step(failed={1: "logits are not finite"})
    failed = bench.last(1)
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, RequestFailedError)
    assert str(failed.error) == "logits are not finite"
    assert bench.last(2) == Tokens((PLAIN,))
    bench.submit(3, prompt)
    assert bench.step() == {2: 1, 3: 12}


def test_a_failure_takes_back_what_was_shared_before() -> None:
    """Blocks computed in earlier steps may be at fault, so they leave the cache too, but not those who use them."""
    bench = Bench()
    prompt = unique(1, 9)
    bench.submit(1, prompt)
    bench.step()
    bench.submit(2, prompt)
    assert bench.step() == {1: 1, 2: 1}
    bench.step(failed={2: "bad"})
    bench.submit(3, prompt)
    assert bench.step() == {1: 1, 3: 9}


def test_aborting_what_waits_or_runs_says_nothing_and_frees_everything() -> None:
    """Whoever aborts knows it; the blocks are free after the next ask."""
    bench = Bench()
    bench.submit(1, 8)
    bench.step()
    bench.submit(2, 8)
    bench.scheduler.abort(1)
    bench.scheduler.abort(2)
    bench.scheduler.abort(2)
    bench.scheduler.abort(99)
    assert not bench.scheduler.num_running + bench.scheduler.num_waiting
    assert bench.scheduler.take_ended() == (2,)
    assert bench.plan() is None
    assert bench.scheduler.take_ended() == (1,)
    assert bench.count("used") == 0
    assert [type(event) for event in bench.events[1]] == [Started, Tokens]


def test_a_result_for_an_aborted_sequence_is_dropped() -> None:
    """A client that leaves while the runner is at work hears nothing more, but what was computed stays in the cache."""
    bench = Bench()
    prompt = unique(1, 9)
    bench.submit(1, prompt)
    plan = bench.plan()
    assert plan is not None
    bench.scheduler.abort(1)
    bench.commit(plan)
    assert bench.events == {}
    bench.submit(2, prompt)
    assert bench.step() == {2: 1}


def test_a_failure_of_an_aborted_sequence_still_counts() -> None:
    """It is told to nobody, and its blocks are not shared."""
    bench = Bench()
    prompt = unique(1, 9)
    bench.submit(1, prompt)
    plan = bench.plan()
    assert plan is not None
    bench.scheduler.abort(1)
    bench.commit(plan, failed={1: "bad"})
    assert bench.events == {}
    bench.submit(2, prompt)
    assert bench.step() == {2: 9}


def test_an_abort_between_ask_and_plan_leaves_the_row_out() -> None:
    """Blocks granted to one that left meanwhile come back with the next ask; the other rows are laid out right."""
    bench = Bench()
    bench.submit(1, 5)
    bench.submit(2, 6)
    bench.submit(3, 7)
    bench.step({1: 11, 2: 12, 3: 13})
    bench.submit(4, 4)
    ask = bench.ask()
    assert ask is not None
    grant = bench.reserve(ask)
    bench.scheduler.abort(2)
    bench.scheduler.abort(4)
    plan = bench.scheduler.plan(grant)
    assert plan is not None
    assert (plan.request_ids, plan.token_ids, plan.starts) == ((1, 3), (11, 13), (5, 7))
    assert plan.admitted == ()
    assert plan.dropped == (2,)
    bench.commit(plan)
    bench.step()
    assert {owner for block in bench.blocks.blocks() for owner, _, _ in block.owners} == {1, 3}


def test_an_abort_of_a_sequence_that_is_being_preempted_is_an_abort() -> None:
    """It neither waits again nor is dropped twice."""
    bench = Bench(num_blocks=5, caching=False)
    bench.submit(1, 7)
    bench.submit(2, 7)
    bench.step()
    bench.step()
    ask = bench.ask()
    assert ask is not None
    grant = bench.reserve(ask)
    assert grant.preempted == (2,)
    bench.scheduler.abort(2)
    plan = bench.scheduler.plan(grant)
    assert plan is not None
    assert plan.dropped == (2,)
    bench.commit(plan)
    assert bench.waiting() == []
    bench.step()
    assert bench.scheduler.take_ended() == (2,)


def test_a_finished_sequence_leaves_its_last_block_in_the_cache() -> None:
    """What the final step computed is shareable: the next turn of a conversation hits it."""
    bench = Bench()
    bench.submit(1, 7, SamplingParams(max_tokens=2))
    bench.step({1: 50})
    bench.step({1: 51})
    bench.submit(2, (*unique(1, 7), 50, 51, 52))
    assert bench.step() == {2: 2}
