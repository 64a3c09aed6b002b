"""Uploaded and produced files: written atomically, owned by one API key, deleted when they expire."""

from __future__ import annotations

import os
import sqlite3
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Self, TypeVar

import attrs

from trio_llm.server.answers.stored import File
from trio_llm.server.batches.database import Database, check_cursor, is_id, new_id
from trio_llm.server.bodies.size_limits import flag_of
from trio_llm.server.errors import HttpError

T = TypeVar("T")


@attrs.frozen(kw_only=True)
class StoredFile:
    """One file as clients see it. Times are Unix seconds; `owner` is the id of an API key, empty without keys."""

    id: str
    filename: str
    purpose: str
    bytes: int
    created_at: int
    expires_at: int | None
    owner: str

    def to_openai(self) -> File:
        """Return OpenAI's file object."""
        return File(**attrs.asdict(self, filter=attrs.filters.exclude("owner")))


@attrs.frozen
class Quotas:
    """Limits of stored bytes; 0 for no limit."""

    in_all: int = 0
    per_owner: int = 0


@attrs.define
class Usage:
    """The bytes that are stored or being written, by owner."""

    quotas: Quotas
    _bytes: Counter[str] = attrs.field(factory=Counter[str])

    def add(self, owner: str, num_bytes: int) -> None:
        """Count bytes; a negative number subtracts them."""
        self._bytes[owner] += num_bytes
        if not self._bytes[owner]:
            del self._bytes[owner]

    def check(self, owner: str, num_bytes: int) -> None:
        """Raise HttpError 413 if `num_bytes` more exceed a quota."""
        for stored, quota, whose, setting in (
            (self._bytes[owner], self.quotas.per_owner, "Your files", "max_stored_bytes_per_key"),
            (self._bytes.total(), self.quotas.in_all, "The files of all keys", "max_stored_bytes"),
        ):
            if 0 < quota < stored + num_bytes:
                limit = f"at most {quota} bytes ({flag_of(setting)})"
                message = f"{whose} would be too large together: {limit}. Delete some, or let them expire."
                raise HttpError(413, message, param="file", code="storage_quota_exceeded")


class FileStore:
    """The files of a data directory. An owner sees only its own files; other ids do not exist for it.

    Args:
        clock: Unix seconds.
        quotas: Limits of stored bytes.
    """

    def __init__(self, database: Database, clock: Callable[[], float], quotas: Quotas | None = None) -> None:
        self._database = database
        self._clock = clock
        self._usage = Usage(quotas or Quotas())
        for row in database.connection.execute("SELECT owner, sum(bytes) AS bytes FROM files GROUP BY owner"):
            self._usage.add(row["owner"], row["bytes"])

    def create(self, filename: str, purpose: str, *, owner: str = "", expires_after_s: int | None = None) -> FileWriter:
        """Begin a file: write to it, then `commit`. Leaving the block without a commit deletes it."""
        now = int(self._clock())
        return FileWriter(
            self._database,
            self._usage,
            StoredFile(
                id=new_id("file"),
                filename=filename,
                purpose=purpose,
                bytes=0,
                created_at=now,
                expires_at=None if expires_after_s is None else now + expires_after_s,
                owner=owner,
            ),
        )

    def get(self, file_id: str, owner: str = "") -> StoredFile | None:
        row = self._database.connection.execute(
            "SELECT * FROM files WHERE id = ? AND owner = ?", (file_id, owner)
        ).fetchone()
        return None if row is None or self._expired(row) else StoredFile(**dict(row))

    def page(
        self, *, owner: str = "", purpose: str | None = None, after: str | None = None, limit: int, newest_first: bool
    ) -> tuple[list[StoredFile], bool]:
        """Return one page and whether more follow. `after` is the id of the last file of the page before.

        Raises:
            InvalidRequestError: There is no file `after`.
        """
        check_cursor(self._database.connection, "files", after, owner)
        order, beyond = ("DESC", "<") if newest_first else ("ASC", ">")
        # Ids are random. rowid increases with every insert, so it is the order of creation.
        rows = self._database.connection.execute(
            f"SELECT * FROM files WHERE owner = :owner AND (:purpose IS NULL OR purpose = :purpose)"  # noqa: S608
            f" AND (expires_at IS NULL OR expires_at > :now)"
            f" AND (:after IS NULL OR rowid {beyond} (SELECT rowid FROM files WHERE id = :after AND owner = :owner))"
            f" ORDER BY rowid {order} LIMIT :rows",
            {"owner": owner, "purpose": purpose, "after": after, "now": int(self._clock()), "rows": limit + 1},
        ).fetchall()
        return [StoredFile(**dict(row)) for row in rows[:limit]], len(rows) > limit

    def in_use(self, file_id: str) -> bool:
        """Return whether a batch that has not ended reads this file."""
        return (
            self._database.connection.execute(
                "SELECT 1 FROM batches WHERE input_file_id = ?"
                " AND status NOT IN ('completed', 'failed', 'expired', 'cancelled')",
                (file_id,),
            ).fetchone()
            is not None
        )

    def delete(self, file_id: str, owner: str = "") -> bool:
        """Delete a file; False if there is none. The caller checks `in_use` first."""
        if (stored := self.get(file_id, owner)) is None:
            return False
        self._database.forget([file_id])
        self._usage.add(owner, -stored.bytes)
        return True

    def delete_expired(self) -> int:
        """Delete every expired file that no running batch reads; return their number."""
        rows = self._database.connection.execute(
            "SELECT id, owner, bytes FROM files WHERE expires_at <= ? AND id NOT IN (SELECT input_file_id FROM batches"
            " WHERE status NOT IN ('completed', 'failed', 'expired', 'cancelled'))",
            (int(self._clock()),),
        ).fetchall()
        if rows:
            self._database.forget([row["id"] for row in rows])
        for row in rows:
            self._usage.add(row["owner"], -row["bytes"])
        return len(rows)

    def path(self, file_id: str) -> Path:
        if not is_id(file_id):
            raise ValueError(f"not a file id: {file_id!r}")
        return self._database.files / file_id

    def open(self, file_id: str) -> BinaryIO:
        """Open a file for reading; do not follow a symbolic link."""
        return os.fdopen(os.open(self.path(file_id), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb")

    def _expired(self, row: sqlite3.Row) -> bool:
        return row["expires_at"] is not None and row["expires_at"] <= self._clock()


class FileWriter:
    """A file being written. `commit` makes contents, name and row durable, in this order, and then visible."""

    def __init__(self, database: Database, usage: Usage, stored: StoredFile) -> None:
        self._database = database
        self._usage = usage
        self._stored = stored
        self._path = database.files / stored.id
        database.connection.execute("INSERT INTO leftovers VALUES (?)", (stored.id,))
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._file = os.fdopen(os.open(self._path, flags, 0o600), "wb")
        self._closed = False

    @property
    def id(self) -> str:
        return self._stored.id

    @property
    def size_bytes(self) -> int:
        return self._stored.bytes

    def write(self, data: bytes) -> None:
        """Append.

        Raises:
            HttpError: 413, a quota would be exceeded. Results of a batch are counted and never refused.
        """
        if self._stored.purpose != "batch_output":
            self._usage.check(self._stored.owner, len(data))
        self._usage.add(self._stored.owner, len(data))
        self._stored = attrs.evolve(self._stored, bytes=self._stored.bytes + len(data))
        self._file.write(data)

    def describe(self, *, filename: str, purpose: str, expires_after_s: int | None) -> None:
        """Set the properties of an upload: its form fields may come after the file."""
        expires_at = None if expires_after_s is None else self._stored.created_at + expires_after_s
        self._stored = attrs.evolve(self._stored, filename=filename, purpose=purpose, expires_at=expires_at)

    def sync(self) -> StoredFile:
        """Make the contents and the name durable. The row is left to `insert`."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._database.fsync_files()
        return self._stored

    def insert(self, connection: sqlite3.Connection) -> None:
        """Write the row of a synced file, inside the caller's transaction."""
        row = attrs.asdict(self._stored)
        connection.execute("DELETE FROM leftovers WHERE id = ?", (self.id,))
        connection.execute(
            f"INSERT INTO files ({', '.join(row)}) VALUES ({', '.join(':' + name for name in row)})",  # noqa: S608
            row,
        )

    def commit(self) -> StoredFile:
        """Make the file visible and return it."""
        return self.commit_with(lambda: self._stored)

    def commit_with(self, work: Callable[[], T]) -> T:
        """Make the file visible in one transaction with what `work` writes: both or neither. Return its result."""
        self.sync()
        with self._database.transaction() as connection:
            self.insert(connection)
            return work()

    def close(self) -> None:
        """Delete the file unless it was committed."""
        if self._closed:
            return
        self._closed = True
        with suppress(OSError):  # It writes what is buffered, and a full disk has no room for that either.
            self._file.close()
        with suppress(sqlite3.Error, OSError):  # Then the next start removes it.
            # Asked, not remembered: a commit may fail after `insert`.
            visible = "SELECT 1 FROM files WHERE id = ?"
            if self._database.connection.execute(visible, (self.id,)).fetchone() is None:
                self._usage.add(self._stored.owner, -self._stored.bytes)
                self._database.remove([self.id])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
