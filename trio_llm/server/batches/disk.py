"""The data directory of a running server: opened at startup, used on its own thread."""

from __future__ import annotations

import errno
import logging
import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import trio

from trio_llm.errors import ConfigError, StorageError
from trio_llm.server.batches.batch_store import BatchStore
from trio_llm.server.batches.database import Database
from trio_llm.server.batches.file_store import FileStore, Quotas
from trio_llm.server.errors import HttpError

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Disk:
    """Files and batches; all calls run on one thread, one after the other.

    Args:
        directory: None for the user's default directory. Only an explicit directory must be usable: otherwise the
            server runs without files and batches.
        port: Distinguishes the default directories of a user's servers.
        quotas: Limits of stored bytes.
        refusal: Why this server has no files and batches, for its clients. None if it has them.
    """

    def __init__(
        self, directory: str | None, port: int = 0, quotas: Quotas | None = None, refusal: str | None = None
    ) -> None:
        self._given = directory
        self._port = port
        self._quotas = quotas or Quotas()
        self._database: Database | None = None
        self._stores: tuple[FileStore, BatchStore] | None = None
        self._refusal = refusal
        self._why_closed = "the server is not serving yet"
        self._limiter = trio.CapacityLimiter(1)

    def open(self) -> None:
        """Open the directory. Raises ConfigError if an explicit one cannot be used."""
        if self._refusal is not None:
            return
        try:
            self._database = Database(default_directory(self._port) if self._given is None else Path(self._given))
        except ConfigError as error:
            if self._given is not None:
                raise
            self._why_closed = error.allowed
            logger.warning("There are no files and batches: %s %s (--data-dir)", error.value, error.allowed)
            return
        files = FileStore(self._database, time.time, self._quotas)
        self._stores = files, BatchStore(self._database, files, time.time)

    def close(self) -> None:
        """Close the directory."""
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
        if self._refusal is not None:
            raise HttpError(501, self._refusal)
        if self._stores is None:
            raise HttpError(503, f"Files and batches are not available: the data directory {self._why_closed}.")
        return self._stores

    async def run(self, call: Callable[..., T], *args: Any) -> T:
        """Call in the storage thread. A cancelled caller still waits, so that no transaction is left running.

        Raises:
            StorageError: The disk or the database fails.
        """
        return await trio.to_thread.run_sync(self.call, call, *args, limiter=self._limiter)

    def call(self, call: Callable[..., T], *args: Any) -> T:
        """Call on the current thread. Raises what `run` raises."""
        try:
            return call(*args)
        except (sqlite3.Error, OSError) as error:
            logger.error("the data directory fails: %s", error)
            raise _storage_error(error) from error


def check_directory(directory: str | None) -> None:
    """Check an explicit directory early, before a model is loaded.

    Raises:
        ConfigError: It cannot be written to, or another server uses it.
    """
    if directory is not None:
        Database(Path(directory)).close()


def default_directory(port: int) -> Path:
    """Return the default state directory of a user's server on `port` (XDG base directories).

    Raises:
        ConfigError: The user has no home directory.
    """
    try:
        state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    except RuntimeError:
        allowed = "must be given: there is no home directory"
        raise ConfigError("server.data_dir", "~", "data directory", allowed) from None
    return state / "trio-llm" / str(port)


def _storage_error(error: sqlite3.Error | OSError) -> StorageError:
    if isinstance(error, OSError):
        disk_full = error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
    else:
        disk_full = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
    if disk_full:
        return StorageError("The server's disk is full: nothing was stored.", disk_full=True)
    return StorageError("The server cannot read or write its data directory; its log has the details.", disk_full=False)
