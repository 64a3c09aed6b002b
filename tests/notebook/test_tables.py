"""The messages of a step show themselves in a notebook as tables that hold their content."""

from __future__ import annotations

from IPython.core.interactiveshell import InteractiveShell

from tests.notebook.stepping import Hand
from trio_llm.messages import StepResult
from trio_llm.notebook import load_ipython_extension


def test_every_message_of_a_step_shows_itself() -> None:
    """After %load_ext all five messages and the block manager have an HTML form that tells the step's facts."""
    shell = InteractiveShell()
    load_ipython_extension(shell)

    def shown(value: object) -> str:
        data, _ = shell.display_formatter.format(value)
        return data["text/html"]

    hand = Hand()
    hand.submit(1, list(range(40)), max_tokens=1)
    ask = hand.scheduler.ask()
    assert "request 1 (40 tokens)" in shown(ask) and "token budget 32" in shown(ask)
    grant = hand.blocks.reserve(ask)
    assert "0 → 32" in shown(grant) and "admitted" in shown(grant)
    assert "<svg" in shown(hand.blocks)
    plan = hand.scheduler.plan(grant)
    assert ">1</td>" in shown(plan) and "32 tokens in one forward pass" in shown(plan) and "… 32 in all" in shown(plan)
    hand.scheduler.commit(StepResult(plan.step, ((),)))
    second = hand.scheduler.plan(hand.blocks.reserve(hand.scheduler.ask()))
    result = StepResult(second.step, ((77,),))
    assert "(77,)" in shown(result)
    commit = shown(hand.scheduler.commit(result))
    assert "token 77" in commit and "finished: length, 40 + 1 tokens" in commit


def test_prefix_hits_and_preemptions_are_named() -> None:
    """A grant says how many tokens were found in the prefix cache."""
    from trio_llm.notebook.tables import grant_table

    hand = Hand()
    hand.submit(1, list(range(40)), max_tokens=1)
    hand.run()
    hand.submit(2, list(range(40)), max_tokens=1)
    grant = hand.blocks.reserve(hand.scheduler.ask())
    assert "admitted, 32 tokens found in the prefix cache" in grant_table(grant)
