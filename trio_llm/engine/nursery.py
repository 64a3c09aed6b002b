"""Nurseries whose only failure is raised as itself: `except InvalidRequestError` works across them."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import trio


@asynccontextmanager
async def open_nursery() -> AsyncGenerator[trio.Nursery, None]:
    """Open a nursery that raises a group only where several of its tasks failed."""
    try:
        async with trio.open_nursery() as nursery:
            yield nursery
    except BaseExceptionGroup as group:
        raise alone(group) from None


def alone(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the one exception in a group, or the group where it has several."""
    return group.exceptions[0] if len(group.exceptions) == 1 else group
