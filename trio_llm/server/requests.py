"""GET /v1/requests/{id}/explain and POST /v1/requests/{id}/cancel, for the requests of the caller's own key."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import UNSET
from quart import Response, g
from quart_trio import QuartTrio

from trio_llm.replay.explanation import Explanation, PromptChunk, Wait
from trio_llm.server.answers.requests import (
    CacheDifference,
    CancelledRequest,
    ExplainedRequest,
    ExplainedSample,
    Neighbour,
    RequestChunk,
    RequestWait,
)
from trio_llm.server.errors import HttpError
from trio_llm.server.http.json_response import json_response
from trio_llm.server.services import Services

_MAX_SHOWN_ID = 128


def register(app: QuartTrio, services: Services) -> None:
    """Add the endpoints."""

    @app.get("/v1/requests/<request_id>/explain")
    async def explain_request(request_id: str) -> Response:
        key_id: str | None = g.get("key_id")
        found = [(at, await services.engine.explain(one)) for at, one in enumerate(_samples(request_id))]
        teller = _Teller(services, key_id)
        samples = [teller.sample(at, explanation) for at, explanation in found if explanation is not None]
        if not samples:
            raise _unknown(request_id)
        return json_response(ExplainedRequest(id=request_id, samples=samples))

    @app.post("/v1/requests/<request_id>/cancel")
    async def cancel_request(request_id: str) -> Response:
        cancelled = [services.engine.cancel(one) for one in _samples(request_id)]
        return json_response(CancelledRequest(id=request_id, cancelled=any(cancelled)))

    def _samples(request_id: str) -> tuple[int, ...]:
        samples = services.own_requests.find(g.get("key_id"), request_id)
        if not samples:
            raise _unknown(request_id)
        return samples


def _unknown(request_id: str) -> HttpError:
    return HttpError(
        404, f"You have no request {request_id[:_MAX_SHOWN_ID]!r} that is remembered: see `id` of its answer."
    )


class _Teller:
    """Puts explanations into the words of the API, for one key."""

    def __init__(self, services: Services, key_id: str | None) -> None:
        self._services = services
        self._key_id = key_id

    def sample(self, index: int, one: Explanation) -> ExplainedSample:
        return ExplainedSample(
            index=index,
            state=one.state,
            reason=one.reason,
            complete=one.complete,
            prompt_tokens=one.num_prompt_tokens,
            cached_tokens=one.num_cached_tokens,
            needed_blocks=one.needed_blocks,
            difference=self._difference(one),
            total_ms=_ms(one.total_s),
            queue_ms=None if one.queue_s is None else _ms(one.queue_s),
            prefill_ms=None if one.prefill_s is None else _ms(one.prefill_s),
            decode_ms=None if one.decode_s is None else _ms(one.decode_s),
            waits=[self._wait(wait) for wait in one.waits],
            chunks=[self._chunk(chunk) for chunk in one.chunks],
            preempted_steps=one.preempted_steps,
            decode_steps=one.num_decode_steps,
            drafts=one.drafts,
            accepted=one.accepted,
        )

    def _wait(self, wait: Wait) -> RequestWait:
        return RequestWait(
            reason=wait.reason,
            first_step=wait.first_step,
            last_step=wait.last_step,
            ms=_ms(wait.seconds),
            free_blocks=wait.free_blocks,
            neighbours=self._neighbours(wait.holders, wait.others),
        )

    def _chunk(self, chunk: PromptChunk) -> RequestChunk:
        return RequestChunk(
            step=chunk.step,
            first=chunk.first,
            tokens=chunk.count,
            ms=None if chunk.seconds is None else _ms(chunk.seconds),
            again=chunk.again,
            neighbours=self._neighbours(chunk.holders, chunk.others),
        )

    def _difference(self, one: Explanation) -> CacheDifference | None:
        if one.difference is None:
            return None
        decode = self._services.tokenizer.decode
        # Without keys, the cached prompt may be anyone's.
        return CacheDifference(
            position=one.difference.position,
            text=decode(one.difference.token_ids, skip_special_tokens=False),
            cached_text=decode(one.difference.cached_token_ids, skip_special_tokens=False)
            if self._services.keys
            else UNSET,
        )

    def _neighbours(self, blocks: Mapping[int, int], tokens: Mapping[int, int]) -> list[Neighbour]:
        """Return the caller's own requests by their ids, the others as one entry."""
        found: dict[str | None, Neighbour] = {}
        for sample in {**blocks, **tokens}:
            name = self._services.own_requests.name(self._key_id, sample)
            one = found.setdefault(name, Neighbour(id=name, requests=0, blocks=0, tokens=0))
            one.requests += 1
            one.blocks += blocks.get(sample, 0)
            one.tokens += tokens.get(sample, 0)
        return list(found.values())


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)
