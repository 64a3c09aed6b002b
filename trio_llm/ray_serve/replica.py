"""A replica: engine and app on Trio in a thread, behind what Ray Serve calls on asyncio."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any

import trio

from trio_llm.assemble import open_engine
from trio_llm.bridge import Bridge
from trio_llm.cli.log import configure_logging
from trio_llm.config import Config
from trio_llm.engine import Engine
from trio_llm.errors import EngineDeadError
from trio_llm.ray_serve.asyncio_asgi import Receive, Send, answer_on_trio
from trio_llm.ray_serve.autoscaling import LOAD
from trio_llm.server.app import ServerApp, create_app

OpenEngine = Callable[..., AbstractAsyncContextManager[Engine]]

NO_BATCHES = (
    "Files and batches belong to one server, and this is one of several replicas. Run `trio-llm serve`, or a single "
    "replica with owns_batches, for them."
)
_UNHEALTHY = frozenset({"stalled", "failing", "dead"})
_log = logging.getLogger(__name__)


class Replica:
    """What Ray Serve starts. One process, one engine, the app of `trio-llm serve`.

    Args:
        config: The settings.
        name: Of this replica; each response has it as `x-replica`.
        owns_batches: It has files and batches.
        open_engine: Opens the engine.
    """

    def __init__(self, config: Config, *, name: str, owns_batches: bool, open_engine: OpenEngine = open_engine) -> None:
        self._config = config
        self._name = name.encode()
        self._owns_batches = owns_batches
        self._open_engine = open_engine
        self._closing = False

    async def open(self) -> None:
        """Load the model. Raises what that raises."""
        configure_logging(self._config.server.log_level, self._config.server.log_dir)
        self._bridge = await asyncio.to_thread(Bridge[ServerApp], self._serve)
        self._bridge.when_ended(self._end_process)

    async def close(self) -> None:
        """Abort what still runs; Ray has waited for it."""
        self._closing = True
        await asyncio.to_thread(self._bridge.close)

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Answer one request, or Ray's messages of the app's life: it ends with the replica."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        else:
            await answer_on_trio(self._bridge, self._bridge.value, scope, receive, partial(self._signed, send))

    async def check_health(self) -> None:
        """Raise if Ray must replace this replica."""
        health = await self._on_trio(lambda app: app.services.engine.health())
        if health.status in _UNHEALTHY:
            raise EngineDeadError(message=f"The engine is {health.status}: {health.reason}")

    async def load(self) -> dict[str, float]:
        """Return the metric of the autoscaler."""
        health = await self._on_trio(lambda app: app.services.engine.health())
        return {LOAD: float(health.num_running + health.num_waiting)}

    async def _on_trio(self, read: Callable[[ServerApp], Any]) -> Any:
        async def run() -> Any:
            return read(self._bridge.value)

        return await asyncio.wrap_future(self._bridge.start(run))

    async def _signed(self, send: Send, message: Any) -> None:
        if message["type"] == "http.response.start":
            # Ray's proxy adds the id that both have.
            headers = [header for header in message["headers"] if header[0] != b"x-request-id"]
            message = {**message, "headers": [*headers, (b"x-replica", self._name)]}
        await send(message)

    async def _live(self, receive: Receive, send: Send) -> None:
        while True:
            kind: str = (await receive())["type"]
            if kind == "lifespan.shutdown":
                await self.close()
            await send({"type": f"{kind}.complete"})
            if kind == "lifespan.shutdown":
                return

    @asynccontextmanager
    async def _serve(self) -> AsyncGenerator[ServerApp]:
        """Open the engine and run the app's background tasks, in the bridge's thread."""
        async with self._open_engine(self._config, tune_interpreter=True) as engine:
            app = create_app(engine, self._config, no_batches=None if self._owns_batches else NO_BATCHES)
            async with trio.open_nursery() as nursery:
                app.nursery = nursery
                await app.startup()
                try:
                    yield app
                finally:
                    with trio.CancelScope(shield=True):
                        await app.shutdown()
                nursery.cancel_scope.cancel()

    def _end_process(self) -> None:
        """End a process whose engine has died: Ray routes to it no longer and starts another one."""
        if not self._closing:
            _log.critical("the engine has ended: this replica ends")
            os._exit(1)
