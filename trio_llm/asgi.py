"""`hypercorn -k trio trio_llm.server.asgi:app`: the same app under hypercorn's own command line.

Settings come from ./config.yaml and the environment; hypercorn's settings have the address. The engine is opened and
closed with the app's lifespan. Prefer `trio-llm serve`: hypercorn's own server has limits that no app can lift.

- One connection's exception ends the whole server: HTTP/2 with a path that is not ASCII is enough, and HTTP/2
  cannot be switched off. Put a proxy in front that speaks HTTP/1.1 to it.
- A client that stops reading delays the end until the kernel gives up on it; HTTP/2 has no backpressure at all.
- Only /health shows a dead engine: hypercorn continues and answers 503.
- Limits on connections, and how long they may wait for a head, another request or a reader, are hypercorn's settings.
- GET /shutdown is answered 501: use hypercorn's signals. SIGTERM to the master drains within
  `--graceful-timeout`, 3 s by default; SIGTERM to the whole process group does not drain, nor does `-w 0`.
- A model must load within hypercorn's `startup_timeout` (60 s, set in its configuration file), and with `-w N`
  every worker loads its own.
"""

from __future__ import annotations

import os
from typing import Any

from trio_llm.assemble import open_engine
from trio_llm.cli.settings import load_settings
from trio_llm.server.app import ServerApp, create_app

_serving: ServerApp | None = None


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Run the lifespan, or one request within it."""
    if scope["type"] == "lifespan":
        await _run_lifespan(scope, receive, send)
    elif _serving is None:
        raise RuntimeError("this app needs a server that runs ASGI's lifespan")
    else:
        await _serving(scope, receive, send)


async def _run_lifespan(scope: Any, receive: Any, send: Any) -> None:
    global _serving  # noqa: PLW0603 - a server imports one callable and says through it when it starts
    try:
        config = load_settings(None, os.environ, {}).config
        async with open_engine(config, tune_interpreter=True) as engine:
            _serving = create_app(engine, config)
            await _serving(scope, receive, send)
    except Exception as error:
        if _serving is None:  # Without this message hypercorn would continue without an app.
            await receive()
            await send({"type": "lifespan.startup.failed", "message": str(error)})
        raise
