"""`hypercorn -k trio trio_llm.server.asgi:app`: the same app under hypercorn's own command line.

Settings come from ./config.yaml and the environment; the engine is opened and closed with the app's
lifespan. `trio-llm serve` is the better way: hypercorn's own server has limits that no app can lift.

- One connection's exception ends the whole server: HTTP/2 with a path that is not ASCII is enough, and HTTP/2
  cannot be switched off. Put a proxy in front that speaks HTTP/1.1 to it.
- A client that stops reading delays the end until the kernel gives up on it; HTTP/2 has no backpressure at all.
- An engine that dies is seen by /health alone: hypercorn goes on answering, with 503.
- GET /shutdown is answered 501: use hypercorn's signals. SIGTERM to the master drains within
  `--graceful-timeout`, 3 s by default; SIGTERM to the whole process group does not drain, nor does `-w 0`.
- With `-w N` every worker loads the model.
"""

from __future__ import annotations

import os
from typing import Any

from trio_llm.assemble import open_engine
from trio_llm.cli.settings import load_settings
from trio_llm.server.app import ServerApp, create_app
from trio_llm.server.connection import ASGIApp

_serving: ServerApp | None = None


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Serve one lifespan, or one request within it."""
    global _serving  # noqa: PLW0603 - an ASGI server imports one callable and says when it starts
    if scope["type"] == "lifespan":
        config = load_settings(None, os.environ, {}).config
        async with open_engine(config, tune_interpreter=True) as engine:
            _serving = create_app(engine, config)
            await _serving(scope, receive, send)
    elif _serving is not None:
        await _serving(scope, receive, send)


_: ASGIApp = app
