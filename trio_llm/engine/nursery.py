"""Nurseries that raise a single failure unwrapped, so that `except InvalidRequestError` works across them."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import trio


@asynccontextmanager
async def open_nursery() -> AsyncGenerator[trio.Nursery, None]:
    """Open a nursery that raises a group only if several of its tasks failed."""
    try:
        async with trio.open_nursery() as nursery:
            yield nursery
    except BaseExceptionGroup as group:
        raise alone(group) from None


def alone(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the only exception of a group, or the group if it has several."""
    return group.exceptions[0] if len(group.exceptions) == 1 else group
