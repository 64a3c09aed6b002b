"""Files and batches in the app: opened at startup, closed at shutdown."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, suppress
from functools import partial
from typing import Any

import msgspec
import trio
from msgspec import Struct
from quart_trio import QuartTrio

from trio_llm.config import LimitsConfig
from trio_llm.errors import InvalidRequestError, StorageError
from trio_llm.server.access.rate_limits import RateLimits
from trio_llm.server.batches import endpoint as batches
from trio_llm.server.batches import files
from trio_llm.server.batches.disk import Disk
from trio_llm.server.batches.file_store import Quotas
from trio_llm.server.batches.input_file import line_body
from trio_llm.server.batches.runner import BatchRunner
from trio_llm.server.bodies.pipeline import parse_body
from trio_llm.server.bodies.size_limits import too_much
from trio_llm.server.bodies.types import ChatBody, CompletionBody
from trio_llm.server.fair_threads import CALLER
from trio_llm.server.generation.prompts import run
from trio_llm.server.generation.respond import Caller
from trio_llm.server.http.edge import Lifetime
from trio_llm.server.openai.chat import chat
from trio_llm.server.openai.completions import complete
from trio_llm.server.openai.embeddings import EmbeddingBody, embed
from trio_llm.server.services import Services

logger = logging.getLogger(__name__)

_EXPIRY_INTERVAL_S = 300.0


def register(app: QuartTrio, services: Services, limits: RateLimits, *, refusal: str | None) -> None:
    """Add the endpoints, and run batches while the app serves. Tokens of lines are charged to their owner.

    With a `refusal`, there are no files and batches, and the endpoints answer 501 with it.
    """
    config = services.config
    quotas = Quotas(in_all=config.limits.max_stored_bytes, per_owner=config.limits.max_stored_bytes_per_key)
    disk = Disk(config.server.data_dir, config.server.port, quotas, refusal)

    async def execute(endpoint: str, text: bytes, owner: str) -> Mapping[str, Any]:
        return await execute_line(services, endpoint, text, owner, limits)

    def is_ending() -> bool:
        return services.engine.health().status in ("draining", "dead")

    # Leave half the rows to live requests: they come first in the queue, but do not preempt running rows.
    in_flight = max(1, config.engine.max_batch_size // 2)
    runner = BatchRunner(
        disk,
        execute,
        keep_running=services.background.keep_running,
        is_ending=is_ending,
        max_in_flight=in_flight,
        limits=config.limits,
        clock=time.time,
        wait_s=limits.wait_s,
    )
    files.register(app, disk, config.limits.max_file_bytes)
    batches.register(app, disk, runner)

    @app.before_serving
    async def start() -> None:
        await disk.run(disk.open)

    async def run_batches() -> None:
        if disk.is_open:
            await runner.run()

    async def close() -> None:
        await disk.run(disk.close)

    async def expire() -> None:
        while disk.is_open:
            with suppress(StorageError):  # It is logged, and the next run may succeed.
                await disk.run(disk.files.delete_expired)
            await trio.sleep(_EXPIRY_INTERVAL_S)

    # Stopped before what closes the directory.
    services.background.while_serving(app, "expiry", expire)
    services.background.while_serving(app, "batches", run_batches, at_end=close)


async def execute_line(
    services: Services, endpoint: str, text: bytes, owner: str, limits: RateLimits | None = None
) -> Mapping[str, Any]:
    """Answer one line of a batch like a request with its body."""
    kind, answer = _ENDPOINTS[endpoint]
    CALLER.set(owner)
    # Parse long lines in a thread: a line may be as long as a request's body.
    body = await run(services, partial(_parse, text, kind, services.config.limits), chars=len(text))
    outcome: Any = None
    async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
        lifetime = Lifetime(nursery, stack)
        if limits is not None:  # Also for a line that failed or was cancelled.
            stack.callback(lambda: limits.charge(owner, sum(lifetime.num_tokens)))
        caller = Caller(
            lifetime=lifetime,
            key_id=owner or None,
            warn=lambda _: None,
            encode=msgspec.to_builtins,
            background=True,
        )
        try:
            outcome = await answer(services, body, caller)
        except Exception as error:  # noqa: BLE001 - raised below: out of a nursery it would be a group of one
            outcome = error
        nursery.cancel_scope.cancel()
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


_ENDPOINTS: Mapping[str, tuple[type[Struct], Callable[[Services, Any, Caller], Awaitable[Any]]]] = {
    "/v1/chat/completions": (ChatBody, chat),
    "/v1/completions": (CompletionBody, complete),
    "/v1/embeddings": (EmbeddingBody, embed),
}


def _parse(text: bytes, kind: type[Struct], limits: LimitsConfig) -> Struct:
    data = line_body(text)
    if len(data) > limits.max_body_bytes:
        raise too_much("The body is too long", limits.max_body_bytes, "max_body_bytes", "body")
    body, extras = parse_body(data, kind, limits)
    if extras:  # A line has no response with headers for a warning.
        logger.info("without effect in a line: %r", [extra.path[:64] for extra in extras[:10]])
    if getattr(body, "stream", None):
        raise InvalidRequestError("A batch cannot stream.", param="stream")
    return body
