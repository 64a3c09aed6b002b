"""Files and batches as a part of the app: opened when it starts to serve, closed when it ends."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Any, cast

import msgspec
import trio
from quart_trio import QuartTrio

from trio_llm.errors import InvalidRequestError
from trio_llm.server import batches, files
from trio_llm.server.batch_runner import BatchRunner
from trio_llm.server.chat import chat
from trio_llm.server.completions import complete
from trio_llm.server.disk import Disk
from trio_llm.server.edge import Lifetime
from trio_llm.server.embeddings import EmbeddingBody, embed
from trio_llm.server.generation import Caller
from trio_llm.server.limits import Limits
from trio_llm.server.requests import ChatBody, CompletionBody, check_body
from trio_llm.server.services import Services


def register(app: QuartTrio, services: Services, limits: Limits) -> None:
    """Add the endpoints, and run batches while the app serves. What lines cost is charged to their owner."""
    config = services.config
    disk = Disk(config.server.data_dir)

    async def execute(endpoint: str, body: Mapping[str, Any], owner: str) -> Mapping[str, Any]:
        return await execute_line(services, endpoint, body, owner, limits)

    # Half the rows are left to live requests: they come first in the queue, but a row that runs is not taken away.
    in_flight = max(1, config.engine.max_batch_size // 2)
    runner = BatchRunner(disk, execute, max_in_flight=in_flight, clock=time.time, wait_s=limits.wait_s)
    files.register(app, disk, config.limits.max_file_bytes)
    batches.register(app, disk, runner)
    # A scope of its own: the app's nursery also holds the task that tells the server that all has ended.
    running, ended = trio.CancelScope(), trio.Event()

    async def run() -> None:
        try:
            with running:
                await runner.run()
        finally:
            ended.set()

    @app.before_serving
    async def start() -> None:
        await disk.run(disk.open)
        if disk.is_open:
            app.nursery.start_soon(run)

    @app.after_serving
    async def stop() -> None:
        running.cancel()
        with trio.CancelScope(shield=True):
            if disk.is_open:
                await ended.wait()  # What was answered is being committed.
            await disk.run(disk.close)


async def execute_line(
    services: Services, endpoint: str, body: Mapping[str, Any], owner: str, limits: Limits | None = None
) -> Mapping[str, Any]:
    """Answer one line of a batch as the endpoint would answer a request."""
    if body.get("stream"):
        raise InvalidRequestError("A batch cannot stream.", param="stream")
    outcome: Any = None
    async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
        lifetime = Lifetime(nursery, stack)
        if limits is not None:  # Also what a line has cost that failed, or was cancelled.
            stack.callback(lambda: limits.charge(owner, sum(lifetime.num_tokens)))
        caller = Caller(lifetime=lifetime, key_id=owner or None, warn=lambda _: None, background=True)
        try:
            outcome = await _call(services, endpoint, body, caller)
        except Exception as error:  # noqa: BLE001 - raised below: out of a nursery it would be a group of one
            outcome = error
        nursery.cancel_scope.cancel()
    if isinstance(outcome, Exception):
        raise outcome
    return cast("Mapping[str, Any]", msgspec.to_builtins(outcome))


async def _call(services: Services, endpoint: str, body: Mapping[str, Any], caller: Caller) -> Any:
    limits = services.config.limits
    match endpoint:
        case "/v1/chat/completions":
            return await chat(services, check_body(body, ChatBody, limits), caller)
        case "/v1/completions":
            return await complete(services, check_body(body, CompletionBody, limits), caller)
        case _:
            return await embed(services, check_body(body, EmbeddingBody, limits), caller)
