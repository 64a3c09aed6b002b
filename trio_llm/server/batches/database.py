"""The SQLite database of files and batches, and its directory.

Layout of the directory: `trio-llm.sqlite3` (write-ahead log), `files/` (one plain file per uploaded or produced
file, named by its id), `lock`. The database has everything that clients see. A directory with other files and no
database of trio-llm is refused, and only files whose id is in the database are ever deleted.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import secrets
import sqlite3
import stat
import weakref
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Literal, Self

from trio_llm.errors import ConfigError, InvalidRequestError

logger = logging.getLogger(__name__)

_NAME = "trio-llm.sqlite3"
_VERSION = 1
# What systems put into any directory by themselves. Other hidden files are somebody's: a home directory may have no
# others.
_IGNORED = re.compile(r"(files/)?(lost\+found|\.DS_Store|\.localized|\.nfs[0-9a-f]+|\.Trash-\d+|\.snapshots?)")
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
-- Files that may be on disk and that no client sees: being written, or being deleted. A crash leaves them behind.
CREATE TABLE IF NOT EXISTS leftovers (id TEXT PRIMARY KEY) STRICT, WITHOUT ROWID;
"""

_ID = re.compile(r"(file|batch)[-_][0-9a-f]{32}")


def new_id(kind: str) -> str:
    """Make an unguessable id in OpenAI's form: `file-…` or `batch_…`."""
    return {"file": "file-", "batch": "batch_"}[kind] + secrets.token_hex(16)


def is_id(text: str) -> bool:
    """Return whether text has the form of our ids; only such text becomes part of a path."""
    return _ID.fullmatch(text) is not None


class Database:
    """An open data directory. It is locked: a second process gets a ConfigError.

    Raises:
        ConfigError: The directory cannot be used, is not trio-llm's, is damaged, or another server uses it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files = directory / "files"
        try:
            _check_directory(directory)
            ours = [path for path in (directory / _NAME, directory / "lock", self.files) if not os.path.lexists(path)]
            self.files.mkdir(parents=True, exist_ok=True, mode=0o700)
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            lock = os.open(directory / "lock", flags, 0o600)
        except (_UnusableError, OSError, ValueError) as error:
            raise _refused(directory, error) from None
        try:
            # Lock before opening the database: another server may be creating it.
            _lock(lock)
        except _UnusableError as error:
            os.close(lock)
            raise _refused(directory, error) from None
        try:
            # SQLite would create it world-readable.
            os.close(os.open(directory / _NAME, flags, 0o600))
            self.connection = _connect(directory / _NAME)
        except (_UnusableError, OSError, sqlite3.Error) as error:
            _remove(ours)
            os.close(lock)
            raise _refused(directory, error) from None
        # Closed with the object at the latest: a server may be cancelled before it closes the directory.
        self.close = weakref.finalize(self, _close, self.connection, lock)
        try:
            self._remove_leftovers()
        except (OSError, sqlite3.Error) as error:
            self.close()
            raise _refused(directory, error) from None

    def forget(self, file_ids: Sequence[str]) -> None:
        """Delete files: their rows first, so that a crash in between leaves no row without a file."""
        with self.transaction() as connection:
            connection.executemany("DELETE FROM files WHERE id = ?", [(file_id,) for file_id in file_ids])
            connection.executemany("INSERT OR IGNORE INTO leftovers VALUES (?)", [(file_id,) for file_id in file_ids])
        self.remove(file_ids)

    def remove(self, file_ids: Sequence[str]) -> None:
        """Delete leftovers from the disk."""
        for file_id in file_ids:
            (self.files / file_id).unlink(missing_ok=True)
        with self.transaction() as connection:
            connection.executemany("DELETE FROM leftovers WHERE id = ?", [(file_id,) for file_id in file_ids])

    def _remove_leftovers(self) -> None:
        rows = self.connection.execute("SELECT id FROM leftovers WHERE id NOT IN (SELECT id FROM files)")
        # The database decides, but only a name of the form of ours becomes a path.
        file_ids = [row["id"] for row in rows if is_id(row["id"])]
        if file_ids:
            names = ", ".join(file_ids[:10])
            logger.warning("removing %d unfinished files of the last run from %s: %s", len(file_ids), self.files, names)
            self.remove(file_ids)

    def transaction(self) -> Transaction:
        return Transaction(self.connection)

    def fsync_files(self) -> None:
        """Make the names in `files/` durable; writers have already synced the contents."""
        fd = os.open(self.files, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _UnusableError(Exception):
    """A requirement that a data directory does not meet."""


def check_cursor(
    connection: sqlite3.Connection, table: Literal["files", "batches"], after: str | None, owner: str
) -> None:
    """Refuse a page after an entry that is not there, for example deleted: an empty page would look like the end.

    Raises:
        InvalidRequestError: This owner has no such entry.
    """
    query = f"SELECT 1 FROM {table} WHERE id = ? AND owner = ?"  # noqa: S608 - one of two names
    if after is not None and connection.execute(query, (after, owner)).fetchone() is None:
        raise InvalidRequestError(f"after = {after[:80]!r} is none of the {table} that there are.", param="after")


def _refused(directory: Path, error: Exception) -> ConfigError:
    match error:
        case _UnusableError():
            allowed = str(error)
        case OSError() | ValueError():
            allowed = f"must be a directory that can be written to ({getattr(error, 'strerror', error)})"
        case _:
            allowed = f"must hold a database that SQLite can open: {_NAME} is damaged or cannot be used ({error})"
    return ConfigError(key="server.data_dir", value=str(directory), source="data directory", allowed=allowed)


def _check_directory(directory: Path) -> None:
    """Refuse a directory with foreign files. Changes nothing."""
    if not os.path.lexists(directory):
        return
    for name in ("lock", *(_NAME + suffix for suffix in ("", "-wal", "-shm", "-journal"))):
        path = directory / name
        if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
            raise _UnusableError(f"must hold no {name} that is not a regular file")
    database = directory / _NAME
    if database.exists() and database.stat().st_size:
        return
    names = {path.name for path in directory.iterdir()} - {"lock", "files", _NAME}
    if (directory / "files").exists():
        names |= {f"files/{path.name}" for path in (directory / "files").iterdir()}
    for name in sorted(names):
        if not _IGNORED.fullmatch(name):
            raise _UnusableError(
                f"must be empty or made by trio-llm: it holds {name!r} and no {_NAME} (give another --data-dir)"
            )


def _remove(ours: Sequence[Path]) -> None:
    """Remove what was made in a directory that is refused after all, while it is locked; a folder if it is empty."""
    for path in ours:
        with suppress(OSError):
            path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)


def _lock(fd: int) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _UnusableError("must not be in use by another server (give this one its own --data-dir)") from None


def _connect(path: Path) -> sqlite3.Connection:
    # Statements are their own transactions; `with database.transaction():` groups several.
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        connection.row_factory = sqlite3.Row
        tables, ours = _tables(connection), _our_tables()
        # `leftovers` is younger than the others.
        if tables and any(not tables.get(name, set()) >= ours[name] for name in ("files", "batches", "lines")):
            raise _UnusableError(f"must hold no {path.name} of another program")
        if (version := connection.execute("PRAGMA user_version").fetchone()[0]) > _VERSION:
            raise _UnusableError(f"was made by a newer trio-llm (version {version}, this one knows {_VERSION})")
        if (found := connection.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            raise _UnusableError(f"must hold a database that is whole: {path.name} is damaged ({found!r})")
        # FULL: committed data survives a power failure, not only a killed process.
        connection.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;")
        # At once: a server that is killed meanwhile leaves no database that looks like another program's.
        connection.executescript(f"BEGIN IMMEDIATE; {SCHEMA} PRAGMA user_version = {_VERSION}; COMMIT;")
    except BaseException:
        connection.close()
        raise
    return connection


def _our_tables() -> dict[str, set[str]]:
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(SCHEMA)
        return _tables(connection)


def _tables(connection: sqlite3.Connection) -> dict[str, set[str]]:
    """Return the columns of each table."""
    names = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()]
    columns = "SELECT name FROM pragma_table_info(?)"
    return {name: {column for (column,) in connection.execute(columns, (name,)).fetchall()} for name in names}


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
            if self._connection.in_transaction:  # Some errors, such as a full disk, have already rolled back.
                self._connection.execute("ROLLBACK")
