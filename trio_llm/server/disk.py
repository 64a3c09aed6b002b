"""The data directory of a running server: opened when it starts to serve, used on a thread of its own."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import trio

from trio_llm.errors import ConfigError
from trio_llm.server.errors import HttpError
from trio_llm.server.storage.batches import BatchStore
from trio_llm.server.storage.database import Database
from trio_llm.server.storage.files import FileStore

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Disk:
    """Files and batches; every call runs on one thread, in turn.

    Args:
        directory: Where; None for a directory of the user's own. Only a directory that was asked for must be usable:
            without one, everything but files and batches is served all the same.
    """

    def __init__(self, directory: str | None) -> None:
        self._given = directory
        self._database: Database | None = None
        self._stores: tuple[FileStore, BatchStore] | None = None
        self._why_closed = "the server is not serving yet"
        self._limiter = trio.CapacityLimiter(1)

    def open(self) -> None:
        """Open the directory. Raises ConfigError where one was asked for and cannot be used."""
        path = Path(self._given) if self._given is not None else default_directory()
        try:
            self._database = Database(path)
        except ConfigError as error:
            if self._given is not None:
                raise
            self._why_closed = error.allowed
            logger.warning("no files and batches: %s %s (--data-dir)", path, error.allowed)
            return
        files = FileStore(self._database, time.time)
        files.delete_expired()
        self._stores = files, BatchStore(self._database, files, time.time)

    def close(self) -> None:
        """Close what `open` opened."""
        if self._database is not None:
            self._database.close()
            self._database = self._stores = None

    @property
    def is_open(self) -> bool:
        return self._stores is not None

    @property
    def files(self) -> FileStore:
        return self._open_stores()[0]

    @property
    def batches(self) -> BatchStore:
        return self._open_stores()[1]

    def _open_stores(self) -> tuple[FileStore, BatchStore]:
        if self._stores is None:
            raise HttpError(503, f"Files and batches are not available: the data directory {self._why_closed}.")
        return self._stores

    async def run(self, call: Callable[..., T], *args: Any) -> T:
        """Call in the storage thread. A cancelled caller still waits: a transaction is not to be left running."""
        return await trio.to_thread.run_sync(call, *args, limiter=self._limiter)


def check_directory(directory: str | None) -> None:
    """Say early, before a model is loaded for nothing, that a directory which was asked for cannot be used.

    Raises:
        ConfigError: It cannot be written to, or another server uses it.
    """
    if directory is not None:
        Database(Path(directory)).close()


def default_directory() -> Path:
    """Return where a user's programs keep their state (XDG base directories)."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "trio-llm"
