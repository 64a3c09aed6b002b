"""GET /v1/engine/live and POST /v1/engine/record: the engine at work, and whether it is recorded."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, cast

import attrs
import msgspec
import trio
from msgspec import Struct
from quart import Response, g, request
from quart_trio import QuartTrio

from trio_llm.engine.live import LiveRequest, Snapshot, Times
from trio_llm.messages import StepTrace
from trio_llm.server.access import auth
from trio_llm.server.answers.live import (
    LiveFrame,
    Recording,
    ShownPool,
    ShownRequest,
    ShownStep,
    ShownTimes,
)
from trio_llm.server.bodies.request_body import read_body
from trio_llm.server.errors import HttpError
from trio_llm.server.http.edge import LIFETIME, Lifetime
from trio_llm.server.http.json_response import json_response
from trio_llm.server.http.sse import DONE, HEADERS
from trio_llm.server.services import Services

# How often an engine without requests is shown.
_IDLE_S = 1.0


class RecordBody(Struct, kw_only=True):
    """POST /v1/engine/record.

    Attributes:
        recording: Whether steps are to be recorded from now on.
    """

    recording: bool


def register(app: QuartTrio, services: Services) -> None:
    """Add the endpoints."""

    @app.get("/v1/engine/live")
    async def watch_engine() -> Response:
        lifetime: Lifetime = cast(Any, request.scope)[LIFETIME]
        lifetime.stack.enter_context(services.engine.live.watch())
        return Response(_frames(services, g.get("key_id")), headers=HEADERS)

    @app.post("/v1/engine/record")
    async def record_steps() -> Response:
        auth.check_operator("/v1/engine/record", services.keys, services.administrators, g.get("key_id"))
        body = await read_body(RecordBody)
        if services.engine.recording is None:
            raise HttpError(409, "There is no directory for records: start the server with --record DIR.")
        services.engine.record(body.recording)
        return json_response(Recording(recording=body.recording))


async def _frames(services: Services, key_id: str | None) -> AsyncIterator[bytes]:
    """Yield the newest state whenever there is a new one and the client has read the one before."""
    live, step = services.engine.live, -1
    while not services.draining and services.engine.health().status not in {"draining", "dead"}:
        snapshot, steps = live.snapshot(), live.steps_after(step)
        step = steps[-1].stats.step if steps else step
        yield b"data: %b\n\n" % msgspec.json.encode(_frame(services, key_id, snapshot, steps))
        is_idle = not (steps or snapshot.requests)
        await trio.sleep_until(max(snapshot.next_at_s, snapshot.at_s + _IDLE_S if is_idle else 0.0))
    yield DONE


def _frame(services: Services, key_id: str | None, snapshot: Snapshot, steps: list[StepTrace]) -> LiveFrame:
    def shown(one: LiveRequest) -> ShownRequest:
        # Without keys, whoever knows an id may cancel the request: it is shown to nobody.
        name = None if key_id is None else services.own_requests.name(key_id, one.request_id)
        return _request(one, name)

    return LiveFrame(
        at_s=round(snapshot.at_s, 3),
        running=snapshot.num_running,
        waiting=snapshot.num_waiting,
        token_budget=services.engine.live.token_budget,
        prompt_budget=snapshot.prompt_budget,
        pool=ShownPool(**attrs.asdict(snapshot.pool, recurse=False)),
        requests=[shown(one) for one in snapshot.requests],
        steps=[_step(one) for one in steps],
        first_token=_times(snapshot.first_token),
        inter_token=_times(snapshot.inter_token),
        recording=services.engine.recording,
    )


def _request(one: LiveRequest, name: str | None) -> ShownRequest:
    return ShownRequest(
        number=one.request_id,
        id=name,
        phase=one.phase,
        age_s=None if one.age_s is None else round(one.age_s, 3),
        prompt_tokens=one.num_prompt_tokens,
        cached_tokens=one.num_cached_tokens,
        computed_tokens=one.num_computed,
        generated_tokens=one.num_generated_tokens,
        preemptions=one.num_preemptions,
        blocks=one.num_blocks,
    )


def _step(one: StepTrace) -> ShownStep:
    stats = one.stats
    return ShownStep(
        step=stats.step,
        ms=round(1000 * stats.seconds, 3),
        own_ms=None if one.own_s is None else round(1000 * one.own_s, 3),
        rows=stats.num_rows,
        tokens=stats.num_tokens,
        prefill_tokens=stats.num_prefill_tokens,
        generated_tokens=stats.num_generated_tokens,
        preempted=stats.num_preempted,
        queried_tokens=stats.blocks.queried_tokens,
        hit_tokens=stats.blocks.hit_tokens,
        drafted=sum(stats.drafted),
        accepted=sum(stats.accepted),
    )


def _times(times: Times | None) -> ShownTimes | None:
    if times is None:
        return None
    return ShownTimes(count=times.count, p50_ms=round(1000 * times.p50_s, 3), p95_ms=round(1000 * times.p95_s, 3))
