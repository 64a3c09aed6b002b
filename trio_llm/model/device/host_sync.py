"""Detect operations that synchronise with the host, which cannot be captured into a graph.

The Python of such an operation decides by values on the device. A graph would record the decisions for the one batch
that it was captured with, and be wrong for every other. The operation calls `requires_host_sync`; a capture, or a check
before it, runs inside `forbid_host_sync`.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

_forbidden: ContextVar[bool] = ContextVar("host_forbidden", default=False)


class HostSyncError(Exception):
    """An operation requires a host sync inside `forbid_host_sync`."""


def requires_host_sync(operation: str) -> None:
    """Declare that this operation reads values of the batch on the host.

    Raises:
        HostSyncError: Inside `forbid_host_sync`.
    """
    if _forbidden.get():
        raise HostSyncError(f"the torch reference of {operation} requires a host sync")


@contextmanager
def forbid_host_sync() -> Generator[None]:
    """Forbid operations that require a host sync, on this thread inside the block."""
    token = _forbidden.set(True)
    try:
        yield
    finally:
        _forbidden.reset(token)
