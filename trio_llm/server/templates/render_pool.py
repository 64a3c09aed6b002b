"""The processes that render chat templates."""

from __future__ import annotations

import atexit
from functools import cache

from trio_llm.server.children.pool import ChildPool


class RenderPool(ChildPool):
    """Processes that run `child`."""

    def __init__(self) -> None:
        super().__init__("trio_llm.server.templates.child", "renders templates")


@cache
def shared_pool() -> RenderPool:
    """Return this process's shared pool."""
    pool = RenderPool()
    atexit.register(pool.close)
    return pool
