"""The one SQLite database behind files and batches, and the directory it lives in.

Layout of the directory: `trio-llm.sqlite3` (write-ahead log), `files/` (one plain file per uploaded or produced
file, named by its id), `lock`. Everything that a client was ever told stands in the database; a file without a row
is a leftover of a crash and is swept at start.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import sqlite3
import weakref
from pathlib import Path
from typing import Self

from trio_llm.errors import ConfigError

SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
    id TEXT PRIMARY KEY, filename TEXT NOT NULL, purpose TEXT NOT NULL,
    bytes INTEGER NOT NULL, created_at INTEGER NOT NULL, expires_at INTEGER,
    owner TEXT NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS batches (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, input_file_id TEXT NOT NULL,
    endpoint TEXT NOT NULL, completion_window TEXT NOT NULL, metadata TEXT NOT NULL,
    status TEXT NOT NULL, created_at INTEGER NOT NULL, expires_at INTEGER NOT NULL,
    in_progress_at INTEGER, finalizing_at INTEGER, completed_at INTEGER, failed_at INTEGER,
    expired_at INTEGER, cancelling_at INTEGER, cancelled_at INTEGER,
    output_expires_after_s INTEGER, output_file_id TEXT, error_file_id TEXT, errors TEXT NOT NULL DEFAULT '[]',
    total INTEGER NOT NULL DEFAULT 0, completed INTEGER NOT NULL DEFAULT 0, failed INTEGER NOT NULL DEFAULT 0,
    prompt_tokens INTEGER NOT NULL DEFAULT 0, cached_tokens INTEGER NOT NULL DEFAULT 0,
    completion_tokens INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE TABLE IF NOT EXISTS lines (
    batch_id TEXT NOT NULL, line INTEGER NOT NULL, custom_id TEXT NOT NULL,
    position INTEGER NOT NULL, length INTEGER NOT NULL,
    state TEXT NOT NULL DEFAULT 'pending', record BLOB,
    PRIMARY KEY (batch_id, line)
) STRICT, WITHOUT ROWID;
CREATE UNIQUE INDEX IF NOT EXISTS lines_custom_id ON lines (batch_id, custom_id);
CREATE INDEX IF NOT EXISTS lines_pending ON lines (batch_id, line) WHERE state = 'pending';
"""

_ID = re.compile(r"(file|batch)[-_][0-9a-f]{32}")


def new_id(kind: str) -> str:
    """Make an id nobody can guess: `file-…` or `batch_…`, as OpenAI spells them."""
    return {"file": "file-", "batch": "batch_"}[kind] + secrets.token_hex(16)


def is_id(text: str) -> bool:
    """Tell whether text has the form of an id of ours; nothing else ever becomes part of a path."""
    return _ID.fullmatch(text) is not None


class Database:
    """An open data directory. One process at a time: a second one gets a ConfigError, not a corrupted batch.

    Raises:
        ConfigError: The directory cannot be used, or another server uses it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files = directory / "files"
        try:
            self.files.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise self._refused(directory, f"must be a directory that can be written to ({error.strerror})") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise self._refused(directory, "must not be in use by another server") from None
        # Statements are their own transactions; `with database.transaction():` groups several.
        self.connection = sqlite3.connect(directory / "trio-llm.sqlite3", isolation_level=None, check_same_thread=False)
        self.connection.row_factory = sqlite3.Row
        # FULL: what a client has seen survives a power cut too, not only a killed process.
        # Closed with the object at the latest: a server may be cancelled before it has said good-bye.
        self.close = weakref.finalize(self, _close, self.connection, self._lock)
        self.connection.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;" + SCHEMA)
        self._sweep()

    @staticmethod
    def _refused(directory: Path, allowed: str) -> ConfigError:
        return ConfigError(key="server.data_dir", value=str(directory), source="data directory", allowed=allowed)

    def _sweep(self) -> None:
        known = {row["id"] for row in self.connection.execute("SELECT id FROM files")}
        for path in self.files.iterdir():
            if path.name not in known:
                path.unlink()

    def transaction(self) -> Transaction:
        return Transaction(self.connection)

    def fsync_files(self) -> None:
        """Make the names in `files/` durable; their contents were synced by whoever wrote them."""
        fd = os.open(self.files, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _close(connection: sqlite3.Connection, lock: int) -> None:
    connection.close()
    os.close(lock)


class Transaction:
    """All or nothing: committed at the end of the block, rolled back if it raises or the process dies."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def __enter__(self) -> sqlite3.Connection:
        self._connection.execute("BEGIN IMMEDIATE")
        return self._connection

    def __exit__(self, exc_type: type[BaseException] | None, *rest: object) -> None:
        try:
            if exc_type is None:
                self._connection.execute("COMMIT")
        finally:
            if self._connection.in_transaction:  # Some errors, as of a full disk, roll back by themselves; others not.
                self._connection.execute("ROLLBACK")
