"""Batches: thousands of requests in a file, each answered exactly once, even if the server is killed.

A line is `pending` until its record (the line of the output or error file) and its new state are committed in one
transaction. A server that dies loses only uncommitted answers, and runs exactly those lines again after a restart.
Output files are written from the records at the end, and become visible in the transaction that ends the batch. The
status is stored because clients cancel; everything else is derived from the lines.
"""

# ruff: noqa: S608 - statements are built only from our own names and placeholders
from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, BinaryIO

import attrs
import msgspec

from trio_llm.server.answers.base import CachedTokens, ReasoningTokens
from trio_llm.server.answers.stored import Batch, BatchFaults, BatchUsage, LineCounts
from trio_llm.server.batches.database import Database, check_cursor, new_id
from trio_llm.server.batches.file_store import FileStore, FileWriter

ENDED = ("completed", "failed", "expired", "cancelled")
TIMES = (
    "created_at",
    "in_progress_at",
    "expires_at",
    "finalizing_at",
    "completed_at",
    "failed_at",
    "expired_at",
    "cancelling_at",
    "cancelled_at",
)


@attrs.frozen
class LineError:
    """One reason why an input file cannot be a batch; `line` counts from 1, None for the whole file."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


@attrs.frozen
class PendingLine:
    """A line without an answer, and its position in the input file."""

    line: int
    custom_id: str
    position: int
    length: int


@attrs.frozen
class LineRecord:
    """The answer to one line: the JSON text for the output file, or for the error file when it `failed`."""

    line: int
    text: bytes
    failed: bool
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


class BatchStore:
    """The batches of a data directory. An owner sees only its own."""

    def __init__(self, database: Database, files: FileStore, clock: Callable[[], float]) -> None:
        self._database = database
        self._connection = database.connection
        self._files = files
        self._clock = clock

    # --- what clients ask for ------------------------------------------------------------------------------------

    def create(
        self,
        *,
        input_file_id: str,
        endpoint: str,
        completion_window: str,
        window_s: int,
        metadata: Mapping[str, str],
        output_expires_after_s: int | None = None,
        owner: str = "",
    ) -> dict[str, Any]:
        """Accept a batch; it is `validating` until `add_lines` or `fail` says otherwise."""
        batch_id, now = new_id("batch"), int(self._clock())
        self._connection.execute(
            "INSERT INTO batches (id, owner, input_file_id, endpoint, completion_window, metadata, status,"
            " created_at, expires_at, output_expires_after_s) VALUES (?, ?, ?, ?, ?, ?, 'validating', ?, ?, ?)",
            (
                batch_id,
                owner,
                input_file_id,
                endpoint,
                completion_window,
                json.dumps(dict(metadata)),
                now,
                now + window_s,
                output_expires_after_s,
            ),
        )
        batch = self.get(batch_id, owner)
        assert batch is not None
        return batch

    def get(self, batch_id: str, owner: str = "") -> dict[str, Any] | None:
        """Return OpenAI's batch object, None if this owner has no such batch."""
        row = self._connection.execute("SELECT * FROM batches WHERE id = ? AND owner = ?", (batch_id, owner)).fetchone()
        return None if row is None else _to_openai(row)

    def page(self, *, owner: str = "", after: str | None = None, limit: int) -> tuple[list[dict[str, Any]], bool]:
        """Return one page, newest first, and whether more follow.

        Raises:
            InvalidRequestError: There is no batch `after`.
        """
        check_cursor(self._connection, "batches", after, owner)
        rows = self._connection.execute(
            "SELECT * FROM batches WHERE owner = :owner AND"
            " (:after IS NULL OR rowid < (SELECT rowid FROM batches WHERE id = :after AND owner = :owner))"
            " ORDER BY rowid DESC LIMIT :rows",
            {"owner": owner, "after": after, "rows": limit + 1},
        ).fetchall()
        return [_to_openai(row) for row in rows[:limit]], len(rows) > limit

    def cancel(self, batch_id: str, owner: str = "") -> dict[str, Any] | None:
        """Cancel a batch; committed answers stay. No effect on a batch that has ended."""
        self._connection.execute(
            "UPDATE batches SET status = 'cancelling', cancelling_at = ? WHERE id = ? AND owner = ?"
            " AND status IN ('validating', 'in_progress')",
            (int(self._clock()), batch_id, owner),
        )
        return self.get(batch_id, owner)

    # --- what the batch runner does ------------------------------------------------------------------------------

    def unfinished(self) -> list[tuple[str, str]]:
        """Return id and owner of all batches that still need work, oldest first: the runner's queue after a restart."""
        rows = self._connection.execute(f"SELECT id, owner FROM batches WHERE status NOT IN {ENDED} ORDER BY rowid")
        return [(row["id"], row["owner"]) for row in rows]

    def row(self, batch_id: str) -> sqlite3.Row:
        """Return a batch's row, of any owner."""
        return self._connection.execute("SELECT * FROM batches WHERE id = ?", (batch_id,)).fetchone()

    def add_lines(self, batch_id: str, lines: Iterable[PendingLine]) -> int:
        """Write the batch's list of lines, replacing that of an interrupted validation. Return its length.

        One transaction over an iterator that reads the input file: the list is never whole in memory.
        """
        with self._database.transaction() as connection:
            connection.execute("DELETE FROM lines WHERE batch_id = ?", (batch_id,))
            connection.executemany(
                "INSERT INTO lines (batch_id, line, custom_id, position, length) VALUES (?, ?, ?, ?, ?)",
                ((batch_id, line.line, line.custom_id, line.position, line.length) for line in lines),
            )
            total: int = connection.execute("SELECT count(*) FROM lines WHERE batch_id = ?", (batch_id,)).fetchone()[0]
            connection.execute(
                "UPDATE batches SET total = ?, status = iif(status = 'validating', 'in_progress', status),"
                " in_progress_at = ? WHERE id = ?",
                (total, int(self._clock()), batch_id),
            )
        return total

    def fail(self, batch_id: str, errors: Sequence[LineError]) -> None:
        """End a batch with an invalid input file."""
        with self._database.transaction() as connection:
            connection.execute("DELETE FROM lines WHERE batch_id = ?", (batch_id,))
            connection.execute(
                "UPDATE batches SET status = 'failed', failed_at = ?, errors = ?, total = 0 WHERE id = ?",
                (int(self._clock()), _to_json(errors), batch_id),
            )

    def pending(self, batch_id: str, *, after_line: int, limit: int) -> list[PendingLine]:
        """Return the next lines without an answer, in input order."""
        rows = self._connection.execute(
            "SELECT line, custom_id, position, length FROM lines"
            " WHERE batch_id = ? AND line > ? AND state = 'pending' ORDER BY line LIMIT ?",
            (batch_id, after_line, limit),
        )
        return [PendingLine(**dict(row)) for row in rows]

    def record(self, batch_id: str, records: Sequence[LineRecord]) -> None:
        """Commit answers in one transaction (one fsync). A line keeps its first answer."""
        with self._database.transaction() as connection:
            for record in records:
                changed = connection.execute(
                    "UPDATE lines SET state = ?, record = ? WHERE batch_id = ? AND line = ? AND state = 'pending'",
                    ("failed" if record.failed else "completed", record.text, batch_id, record.line),
                ).rowcount
                if changed:
                    connection.execute(
                        "UPDATE batches SET completed = completed + ?, failed = failed + ?,"
                        " prompt_tokens = prompt_tokens + ?, cached_tokens = cached_tokens + ?,"
                        " completion_tokens = completion_tokens + ? WHERE id = ?",
                        (
                            int(not record.failed),
                            int(record.failed),
                            record.prompt_tokens,
                            record.cached_tokens,
                            record.completion_tokens,
                            batch_id,
                        ),
                    )

    def finish(
        self,
        batch_id: str,
        status: str,
        unanswered: Callable[[PendingLine], bytes],
        errors: Sequence[LineError] = (),
    ) -> None:
        """End a batch as `completed`, `expired`, `cancelled` or `failed`: write its files, drop its lines.

        `unanswered` makes the error-file line of a line without an answer; `errors` are the batch's own.
        """
        assert status in ("completed", "expired", "cancelled", "failed"), status
        self._connection.execute(
            "UPDATE batches SET status = 'finalizing', finalizing_at = ? WHERE id = ? AND status = 'in_progress'",
            (int(self._clock()), batch_id),
        )
        with ExitStack() as stack:
            output = self._write(stack, batch_id, "output", self._records(batch_id, ("completed",), unanswered))
            error = self._write(stack, batch_id, "error", self._records(batch_id, ("failed", "pending"), unanswered))
            with self._database.transaction() as connection:
                for writer in (output, error):
                    if writer is not None:
                        writer.insert(connection)
                connection.execute("DELETE FROM lines WHERE batch_id = ?", (batch_id,))
                connection.execute(
                    f"UPDATE batches SET status = ?, {status}_at = ?, output_file_id = ?, error_file_id = ?,"
                    " failed = total - completed, errors = ? WHERE id = ?",
                    (status, int(self._clock()), output and output.id, error and error.id, _to_json(errors), batch_id),
                )

    def _write(self, stack: ExitStack, batch_id: str, name: str, lines: Iterable[bytes]) -> FileWriter | None:
        """Write a result file, durable but not yet visible; None if it would be empty."""
        row = self.row(batch_id)
        writer = stack.enter_context(
            self._files.create(
                f"{batch_id}_{name}.jsonl",
                "batch_output",
                owner=row["owner"],
                expires_after_s=row["output_expires_after_s"],
            )
        )
        for line in lines:
            writer.write(line + b"\n")
        if not writer.size_bytes:
            return None
        writer.sync()
        return writer

    def _records(
        self, batch_id: str, states: Sequence[str], unanswered: Callable[[PendingLine], bytes]
    ) -> Iterator[bytes]:
        """Yield the records of the lines in these states, in input order."""
        for row in self._connection.execute(
            "SELECT line, custom_id, position, length, state, record FROM lines"
            f" WHERE batch_id = ? AND state IN ({', '.join('?' for _ in states)}) ORDER BY line",
            (batch_id, *states),
        ):
            if row["state"] == "pending":
                yield unanswered(PendingLine(row["line"], row["custom_id"], row["position"], row["length"]))
            else:
                yield row["record"]


def _to_json(errors: Sequence[LineError]) -> str:
    return json.dumps([attrs.asdict(error) for error in errors])


def read_line(file: BinaryIO, line: PendingLine) -> bytes:
    """Read one line of an open input file."""
    file.seek(line.position)
    return file.read(line.length)


def _to_openai(row: sqlite3.Row) -> dict[str, Any]:
    errors = json.loads(row["errors"])
    usage = BatchUsage(
        input_tokens=row["prompt_tokens"],
        input_tokens_details=CachedTokens(cached_tokens=row["cached_tokens"]),
        output_tokens=row["completion_tokens"],
        output_tokens_details=ReasoningTokens(reasoning_tokens=0),
        total_tokens=row["prompt_tokens"] + row["completion_tokens"],
    )
    batch = Batch(
        id=row["id"],
        endpoint=row["endpoint"],
        errors=BatchFaults(data=errors) if errors else None,
        input_file_id=row["input_file_id"],
        completion_window=row["completion_window"],
        status=row["status"],
        output_file_id=row["output_file_id"],
        error_file_id=row["error_file_id"],
        **{name: row[name] for name in TIMES},
        request_counts=LineCounts(total=row["total"], completed=row["completed"], failed=row["failed"]),
        usage=usage,
        metadata=json.loads(row["metadata"]) or None,
    )
    return msgspec.to_builtins(batch)
