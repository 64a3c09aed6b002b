"""Why a request of a record was slow, in the words of GET /v1/requests/{id}/explain."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from trio_llm.errors import RecordError
from trio_llm.replay.explanation import Explanation, PastRequest, PastStep, explain
from trio_llm.replay.frames import Committed
from trio_llm.replay.lives import Lives, walk
from trio_llm.replay.machine import PlannedStep

if TYPE_CHECKING:
    from trio_llm.replay.replay import Replay


def explain_request(replay: Replay, request_id: int) -> Explanation:
    """Explain where the time of a request went; see `Replay.explain`."""
    lives, steps, now_s = Lives(), dict[int, PastStep](), 0.0
    for call, made in walk(replay, lives):
        now_s = call.at_s
        if isinstance(made, PlannedStep):
            ask = made.ask
            steps[ask.step] = PastStep(ask.step, now_s, ask.waiting, ask.preempt_order, ask.token_budget, made.grant)
        elif isinstance(call, Committed) and call.step in steps:
            steps[call.step].committed_s = now_s
    if request_id not in lives.lives:
        raise RecordError(f"there is no request {request_id} in {replay.record.path}")
    life, setup = lives.lives[request_id], replay.setup
    past = PastRequest(
        num_prompt_tokens=life.request.num_prompt_tokens,
        leader=life.request.leader,
        arrived_s=life.arrived_s or 0.0,
        admitted=life.started_step is not None,
        num_cached_tokens=life.num_cached_tokens,
        stats=life.stats,
    )
    told = explain(
        request_id,
        past,
        tuple(steps.values()),
        groups=setup.groups,
        max_batch_size=setup.max_batch_size,
        now_s=now_s,
    )
    return told if life.arrived_s is not None else attrs.evolve(told, complete=False)
