"""The messages of a step show themselves in a notebook as tables that hold their content."""

from __future__ import annotations

from typing import Any

from IPython.core.interactiveshell import InteractiveShell

from tests.notebook.stepping import Hand, words
from trio_llm.messages import BlockAsk, BlockGrant, StepPlan, StepResult
from trio_llm.notebook import load_ipython_extension
from trio_llm.notebook.tables import ask_table, commit_table, plan_table, result_table, scheduler_table, spell


def asked(hand: Hand) -> BlockAsk:
    """Return the ask of a step that has something to do."""
    ask = hand.scheduler.ask()
    assert ask is not None
    return ask


def planned(hand: Hand, grant: BlockGrant) -> StepPlan:
    """Return the plan of a grant that has rows."""
    plan = hand.scheduler.plan(grant)
    assert plan is not None
    return plan


def test_every_message_of_a_step_shows_itself() -> None:
    """After %load_ext all five messages and the block manager have an HTML form that tells the step's facts."""
    shell = InteractiveShell()
    load_ipython_extension(shell)
    formatter: Any = shell.display_formatter

    def shown(value: object) -> str:
        data, _ = formatter.format(value)
        return data["text/html"]

    hand = Hand()
    hand.submit(1, list(range(40)), max_tokens=1)
    ask = asked(hand)
    assert "request 1 (40 tokens)" in shown(ask) and "token budget 32" in shown(ask)
    grant = hand.blocks.reserve(ask)
    assert "waiting" in shown(hand.scheduler) and ">40</td>" in shown(hand.scheduler)
    assert "0 → 32" in shown(grant) and "admitted" in shown(grant)
    assert "<svg" in shown(hand.blocks)
    plan = planned(hand, grant)
    assert ">1</td>" in shown(plan) and "32 tokens in one forward pass" in shown(plan) and "… 32 in all" in shown(plan)
    hand.scheduler.commit(StepResult(plan.step, ((),)))
    second = planned(hand, hand.blocks.reserve(asked(hand)))
    result = StepResult(second.step, ((77,),))
    assert ">77</td>" in shown(result)
    commit = shown(hand.scheduler.commit(result))
    assert "token 77" in commit and "finished: length, 40 + 1 tokens" in commit


def test_prefix_hits_and_preemptions_are_named() -> None:
    """A grant says how many tokens were found in the prefix cache."""
    from trio_llm.notebook.tables import grant_table

    hand = Hand()
    hand.submit(1, list(range(40)), max_tokens=1)
    hand.run()
    hand.submit(2, list(range(40)), max_tokens=1)
    grant = hand.blocks.reserve(asked(hand))
    assert "admitted, 32 tokens found in the prefix cache" in grant_table(grant)


def test_tokens_stand_with_their_texts() -> None:
    """With a decoder, every table that has token ids has their texts too."""
    hand = Hand()
    hand.submit(1, list(range(40)), max_tokens=3)
    hand.step()
    assert spell((1, 2), words) == "1 'w1', 2 'w2'" and spell(range(9), None) == "0, 1, 2, 3, … 9 in all"
    ask = asked(hand)
    plan = planned(hand, hand.blocks.reserve(ask))
    assert "32 &#x27;w32&#x27;, 33 &#x27;w33&#x27;" in plan_table(plan, words)
    result = StepResult(plan.step, ((77,),))
    assert "77 &#x27;w77&#x27;" in result_table(result, words)
    assert "token 77 &#x27;w77&#x27;" in commit_table(hand.scheduler.commit(result), words)
    assert "77 &#x27;w77&#x27;" in scheduler_table(hand.scheduler, words)
    assert "77 &#x27;w77&#x27;" in ask_table(asked(hand), words)
