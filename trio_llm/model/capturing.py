"""What may not be captured into a graph: operations whose Python looks at values that the device holds or decides by.

Such an operation would be recorded with the decisions of the one batch it was captured with, and be wrong for every
other. It says so by `asks_host`; whoever captures, or checks before, does it inside `without_host`.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

_forbidden: ContextVar[bool] = ContextVar("host_forbidden", default=False)


class NeedsHostError(Exception):
    """An operation has to ask the host where nothing may."""


def asks_host(operation: str) -> None:
    """Say that this operation looks at the batch from the host.

    Raises:
        NeedsHostError: Inside `without_host`.
    """
    if _forbidden.get():
        raise NeedsHostError(f"the torch reference of {operation} asks the host in the middle")


@contextmanager
def without_host() -> Generator[None]:
    """Forbid operations that ask the host, for what this thread calls inside the block."""
    token = _forbidden.set(True)
    try:
        yield
    finally:
        _forbidden.reset(token)
