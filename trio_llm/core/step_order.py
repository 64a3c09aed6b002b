"""Checks the order of the calls that make a step. Their errors name the call that comes next."""

from __future__ import annotations

from trio_llm.errors import OutOfOrderError
from trio_llm.messages import BlockAsk, BlockGrant, StepResult


def check_ask(asked: BlockAsk | None, num_in_flight: int) -> None:
    """Refuse an ask before the last one is planned, or while two steps are in flight."""
    if asked is not None:
        raise OutOfOrderError("ask()", f"step {asked.step} was asked for and is not planned", _plan(asked))
    if num_in_flight > 1:
        raise OutOfOrderError("ask()", "two steps are planned and not committed", "commit(result of the older one)")


def check_reserve(ask: object, last_step: int) -> None:
    """Refuse anything but the next ask."""
    if not isinstance(ask, BlockAsk):
        why = "there is nothing to run, ask() returned None" if ask is None else f"takes a BlockAsk, not {_kind(ask)}"
        raise OutOfOrderError("reserve()", why, "submit a request, or ask = scheduler.ask()")
    if ask.step <= last_step:
        raise OutOfOrderError("reserve()", f"step {ask.step} has its blocks already", "scheduler.plan(that grant)")


def check_plan(asked: BlockAsk | None, grant: object) -> None:
    """Refuse any grant but that of the step that was asked for."""
    if not isinstance(grant, BlockGrant):
        raise OutOfOrderError("plan()", f"takes a BlockGrant, not {_kind(grant)}", "plan(blocks.reserve(ask))")
    if asked is None:
        raise OutOfOrderError("plan()", f"step {grant.step} is planned already", "commit(runner.step(plan)), or ask()")
    if grant.step != asked.step:
        raise OutOfOrderError("plan()", f"the grant is that of step {grant.step}, not {asked.step}", _plan(asked))


def check_commit(asked: BlockAsk | None, oldest_step: int | None, result: object) -> None:
    """Refuse any result but that of the oldest step in flight."""
    if not isinstance(result, StepResult):
        raise OutOfOrderError("commit()", f"takes a StepResult, not {_kind(result)}", "commit(runner.step(plan))")
    if asked is not None:
        raise OutOfOrderError("commit()", f"step {asked.step} was asked for and is not planned", _plan(asked))
    if oldest_step is None:
        raise OutOfOrderError("commit()", f"step {result.step} is committed already, or was never planned", "ask()")
    if result.step != oldest_step:
        why = f"the result is that of step {result.step}, not {oldest_step}"
        raise OutOfOrderError("commit()", why, f"commit(result of step {oldest_step})")


def _plan(asked: BlockAsk) -> str:
    return f"plan(blocks.reserve(ask)) for step {asked.step}"


def _kind(value: object) -> str:
    return "None" if value is None else type(value).__name__
