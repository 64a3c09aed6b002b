"""Uploaded and produced files: written whole or not at all, owned by one API key, gone when they expire."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self

import attrs

from trio_llm.server.storage.database import Database, is_id, new_id

Purpose = Literal["batch", "batch_output", "user_data", "assistants", "fine-tune", "vision", "evals"]


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

    def to_openai(self) -> dict[str, Any]:
        """Return OpenAI's file object."""
        shown = attrs.asdict(self, filter=attrs.filters.exclude("owner"))
        return shown | {"object": "file", "status": "processed", "status_details": None}


class FileStore:
    """The files of a data directory. An owner sees its own files only; any other id does not exist for it."""

    def __init__(self, database: Database, clock: Callable[[], float]) -> None:
        self._database = database
        self._clock = clock

    def create(self, filename: str, purpose: str, *, owner: str = "", expires_after_s: int | None = None) -> FileWriter:
        """Begin a file: write to it, then `commit`. Leaving the block without a commit leaves nothing behind."""
        now = int(self._clock())
        return FileWriter(
            self._database,
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
        """Return one page and whether more follow. `after` is the id of the last file of the page before."""
        order, beyond = ("DESC", "<") if newest_first else ("ASC", ">")
        # Ids are random: rowid, which grows with every insert, is the order of creation.
        rows = self._database.connection.execute(
            f"SELECT * FROM files WHERE owner = :owner AND (:purpose IS NULL OR purpose = :purpose)"  # noqa: S608
            f" AND (expires_at IS NULL OR expires_at > :now)"
            f" AND (:after IS NULL OR rowid {beyond} (SELECT rowid FROM files WHERE id = :after AND owner = :owner))"
            f" ORDER BY rowid {order} LIMIT :rows",
            {"owner": owner, "purpose": purpose, "after": after, "now": int(self._clock()), "rows": limit + 1},
        ).fetchall()
        return [StoredFile(**dict(row)) for row in rows[:limit]], len(rows) > limit

    def in_use(self, file_id: str) -> bool:
        """Tell whether a batch that has not ended reads this file."""
        return (
            self._database.connection.execute(
                "SELECT 1 FROM batches WHERE input_file_id = ?"
                " AND status NOT IN ('completed', 'failed', 'expired', 'cancelled')",
                (file_id,),
            ).fetchone()
            is not None
        )

    def delete(self, file_id: str, owner: str = "") -> bool:
        """Forget a file; False if there is none. The caller has asked `in_use` first."""
        if self.get(file_id, owner) is None:
            return False
        # The row first: a crash between the two leaves a file that the next start sweeps, never a row without a file.
        self._database.connection.execute("DELETE FROM files WHERE id = ?", (file_id,))
        self.path(file_id).unlink(missing_ok=True)
        return True

    def delete_expired(self) -> int:
        """Forget every file whose time is over and that no running batch reads; return how many."""
        rows = self._database.connection.execute(
            "SELECT id FROM files WHERE expires_at <= ? AND id NOT IN (SELECT input_file_id FROM batches"
            " WHERE status NOT IN ('completed', 'failed', 'expired', 'cancelled'))",
            (int(self._clock()),),
        ).fetchall()
        for row in rows:
            self._database.connection.execute("DELETE FROM files WHERE id = ?", (row["id"],))
            self.path(row["id"]).unlink(missing_ok=True)
        return len(rows)

    def path(self, file_id: str) -> Path:
        if not is_id(file_id):
            raise ValueError(f"not a file id: {file_id!r}")
        return self._database.files / file_id

    def open(self, file_id: str) -> BinaryIO:
        """Open a file for reading, never through a link that somebody put in its place."""
        return os.fdopen(os.open(self.path(file_id), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb")

    def _expired(self, row: sqlite3.Row) -> bool:
        return row["expires_at"] is not None and row["expires_at"] <= self._clock()


class FileWriter:
    """A file being written. `commit` makes contents, name and row durable, in this order, and then visible."""

    def __init__(self, database: Database, stored: StoredFile) -> None:
        self._database = database
        self._stored = stored
        self._path = database.files / stored.id
        self._file = self._path.open("xb")
        self._committed = False

    @property
    def id(self) -> str:
        return self._stored.id

    @property
    def size_bytes(self) -> int:
        return self._file.tell()

    def write(self, data: bytes) -> None:
        self._file.write(data)

    def describe(self, *, filename: str, purpose: str, owner: str, expires_after_s: int | None) -> None:
        """Say what an upload is once that is known; its fields may come after the file."""
        expires_at = None if expires_after_s is None else self._stored.created_at + expires_after_s
        self._stored = attrs.evolve(
            self._stored, filename=filename, purpose=purpose, owner=owner, expires_at=expires_at
        )

    def sync(self) -> StoredFile:
        """Make the contents and the name durable; what is left is the row (`insert`)."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._stored = attrs.evolve(self._stored, bytes=self._file.tell())
        self._file.close()
        self._database.fsync_files()
        return self._stored

    def insert(self, connection: sqlite3.Connection) -> None:
        """Write the row of a synced file, inside the caller's transaction if there is one."""
        row = attrs.asdict(self._stored)
        connection.execute(
            f"INSERT INTO files ({', '.join(row)}) VALUES ({', '.join(':' + name for name in row)})",  # noqa: S608
            row,
        )
        self._committed = True

    def commit(self) -> StoredFile:
        """Make the file visible and return it."""
        self.sync()
        self.insert(self._database.connection)
        return self._stored

    def close(self) -> None:
        """Leave nothing behind of a file that was not committed."""
        self._file.close()
        if not self._committed:
            self._path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
