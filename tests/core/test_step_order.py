"""Stepping by hand: a verb out of order, or given the wrong thing, changes nothing and says what comes next."""

from __future__ import annotations

from typing import Any

import attrs
import pytest

from trio_llm.core.block_manager import BlockManager
from trio_llm.core.scheduler import Scheduler
from trio_llm.errors import InvalidRequestError, OutOfOrderError
from trio_llm.messages import StepPlan, StepResult
from trio_llm.model_info import KVGroup
from trio_llm.params import SamplingParams, Submission


class Hand:
    """A core that is stepped by hand, with one request that goes on for a while."""

    def __init__(self) -> None:
        self.blocks = BlockManager(num_blocks=9, groups=(KVGroup((0,), 16),), secret=b"x")
        self.scheduler = Scheduler(max_num_batched_tokens=8, max_batch_size=2, max_model_len=64, eos_token_ids=(2,))
        self.scheduler.submit(1, Submission([3, 4, 5], SamplingParams(max_tokens=9)))

    def plan(self) -> StepPlan:
        ask = self.scheduler.ask()
        assert ask is not None
        plan = self.scheduler.plan(self.blocks.reserve(ask))
        assert plan is not None
        return plan


def result_of(plan: StepPlan) -> StepResult:
    """Sample token 7 in every row."""
    return StepResult(plan.step, tuple((7,) for _ in plan.request_ids))


def test_asking_twice() -> None:
    """The step that was asked for has to be planned first."""
    hand = Hand()
    ask = hand.scheduler.ask()
    with pytest.raises(
        OutOfOrderError, match=r"^ask\(\): step 1 was asked .* next: plan\(blocks.reserve\(ask\)\) for step 1"
    ):
        hand.scheduler.ask()
    assert hand.scheduler.plan(hand.blocks.reserve(ask)) is not None


def test_reserving_twice() -> None:
    """A step has its blocks once; what came back for it is still good."""
    hand = Hand()
    ask = hand.scheduler.ask()
    grant = hand.blocks.reserve(ask)
    with pytest.raises(
        OutOfOrderError, match=r"^reserve\(\): step 1 has its blocks already\. Expected next: scheduler\.plan"
    ):
        hand.blocks.reserve(ask)
    assert hand.scheduler.plan(grant) is not None


def test_planning_twice() -> None:
    """A grant is planned once; the step in flight is still good."""
    hand = Hand()
    grant = hand.blocks.reserve(hand.scheduler.ask())
    plan = hand.scheduler.plan(grant)
    with pytest.raises(OutOfOrderError, match=r"^plan\(\): step 1 is planned already\. Expected next: commit\("):
        hand.scheduler.plan(grant)
    assert hand.scheduler.commit(result_of(plan)).events


def test_planning_the_grant_of_another_step() -> None:
    """A grant that was kept from an earlier step is not taken for this one."""
    hand = Hand()
    old = hand.blocks.reserve(hand.scheduler.ask())
    hand.scheduler.commit(result_of(hand.scheduler.plan(old)))
    hand.scheduler.ask()
    with pytest.raises(OutOfOrderError, match=r"the grant is that of step 1, not 2"):
        hand.scheduler.plan(old)


def test_committing_twice_too_early_and_the_wrong_step() -> None:
    """A result is committed once, after its plan, in the order of the plans."""
    hand = Hand()
    plan = hand.plan()
    with pytest.raises(
        OutOfOrderError, match=r"the result is that of step 5, not 1\. Expected next: commit\(result of step 1\)"
    ):
        hand.scheduler.commit(attrs.evolve(result_of(plan), step=5))
    hand.scheduler.commit(result_of(plan))
    with pytest.raises(
        OutOfOrderError, match=r"step 1 is committed already, or was never planned\. Expected next: ask\(\)"
    ):
        hand.scheduler.commit(result_of(plan))
    hand.scheduler.ask()
    with pytest.raises(OutOfOrderError, match=r"^commit\(\): step 2 was asked for and is not planned"):
        hand.scheduler.commit(result_of(plan))


@pytest.mark.parametrize(
    ("verb", "given", "says"),
    [
        ("reserve", None, "ask() returned None. Expected next: submit a request"),
        ("reserve", "text", "takes a BlockAsk, not str"),
        ("plan", None, "takes a BlockGrant, not None"),
        ("commit", None, "takes a StepResult, not None"),
    ],
)
def test_the_wrong_thing(verb: str, given: Any, says: str) -> None:
    """What a verb takes is what the one before it returned."""
    hand = Hand()
    owner = hand.blocks if verb == "reserve" else hand.scheduler
    with pytest.raises(OutOfOrderError) as caught:
        getattr(owner, verb)(given)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("text", "prompt_token_ids is text: encode it first, with tokenizer.encode(text)"),
        (b"bytes", "prompt_token_ids is text"),
        ([[1, 2]], "must be integers, not list"),
        ([1, 2.0], "must be integers, not float"),
        (["a"], "must be integers, not str"),
    ],
)
def test_text_where_ids_belong(prompt: Any, says: str) -> None:
    """A prompt of a submission is token ids; text says how to get them."""
    with pytest.raises(InvalidRequestError) as caught:
        Submission(prompt, SamplingParams())
    assert says in str(caught.value)


def test_a_number_in_use() -> None:
    """Two open requests cannot have one number."""
    with pytest.raises(InvalidRequestError, match="request_id = 1 is in use"):
        Hand().scheduler.submit(1, Submission([3], SamplingParams()))
