"""A private server for the duration of a command, so that `chat` uses it like any other server."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from functools import partial

import attrs
import trio

from trio_llm.assemble import open_engine
from trio_llm.cli.client import Api
from trio_llm.config import AuthConfig, Config
from trio_llm.model_info import Progress
from trio_llm.server.app import create_app
from trio_llm.server.http.serve import serve


@asynccontextmanager
async def own_server(config: Config, report: Callable[[Progress], None] | None = None) -> AsyncGenerator[Api, None]:
    """Load a model and serve it on a free loopback port, with a key for this block only."""
    key = secrets.token_hex(32)
    auth = AuthConfig(api_keys=(key,), rate_limit_requests=0)
    # Never the user's own directory: its pending batches would run here.
    with tempfile.TemporaryDirectory(prefix="trio-llm-") as data_dir:
        config = attrs.evolve(config, auth=auth, server=attrs.evolve(config.server, data_dir=data_dir))
        async with open_engine(config, report=report) as engine, trio.open_nursery() as nursery:
            listen = partial(
                serve,
                create_app(engine, config),
                host="127.0.0.1",
                port=0,
                shutdown_trigger=trio.sleep_forever,
                limits=config.limits,
            )
            urls = await nursery.start(listen)
            yield Api(f"{urls[0]}/v1", key)
            nursery.cancel_scope.cancel()
