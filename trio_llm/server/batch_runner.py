"""Works off batches: every line of an input file through the same engine as live requests, behind them in the queue.

One task per batch and one at a time per server, oldest first; within it so many lines at once. What is answered is
committed in groups before anybody can see it. Stopping the server at any instant, in order or not, only leaves lines
pending; the next start goes on with them.
"""

from __future__ import annotations

import json
import logging
import secrets
import sqlite3
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, BinaryIO, cast

import msgspec
import trio

from trio_llm.errors import DrainingError, EngineDeadError, OverloadedError
from trio_llm.server.disk import Disk
from trio_llm.server.errors import error_object, to_http_error
from trio_llm.server.storage.batches import LineError, LineRecord, PendingLine, read_line

logger = logging.getLogger(__name__)

MAX_LINES = 50_000
MAX_LINE_BYTES = 2 * 1024 * 1024
_MAX_REPORTED_ERRORS = 100
_MAX_CUSTOM_ID_CHARS = 512
_READ_AHEAD = 64
_COMMIT_GROUP = 256
_DISK_RETRY_S = 30.0


Execute = Callable[[str, Mapping[str, Any], str], Awaitable[Mapping[str, Any]]]
"""(endpoint, request body, owner) -> the answer's body; raises what the endpoint raises."""


class BatchRunner:
    """Runs batches until cancelled.

    Args:
        execute: Answers one request; must be safe to cancel.
        max_in_flight: Lines at once.
        clock: Unix seconds.
    """

    def __init__(self, disk: Disk, execute: Execute, *, max_in_flight: int, clock: Callable[[], float]) -> None:
        self._disk = disk
        self._execute = execute
        self._max_in_flight = max_in_flight
        self._clock = clock
        self._wake = trio.Event()
        self._current: tuple[str, trio.CancelScope] | None = None

    def notify(self) -> None:
        """Say that there is a new batch."""
        self._wake.set()

    def interrupt(self, batch_id: str) -> None:
        """Say that a batch was cancelled; its lines in flight end now."""
        if self._current is not None and self._current[0] == batch_id:
            self._current[1].cancel()
        self.notify()

    async def run(self) -> None:
        """Work off what there is and wait for more, for ever."""
        while True:
            self._wake = trio.Event()
            disk_failed = False
            try:
                for batch_id in await self._disk.run(self._disk.batches.unfinished):
                    if not await self._work(batch_id):
                        logger.info("batch %s goes on after the next start", batch_id)
                        return
            except* (sqlite3.Error, OSError) as errors:
                disk_failed = True
                logger.error("the disk fails; batches go on in %s s", _DISK_RETRY_S, exc_info=errors)
            if disk_failed:
                await trio.sleep(_DISK_RETRY_S)
            else:
                await self._wake.wait()

    async def _work(self, batch_id: str) -> bool:
        """Bring a batch to its end; False if the engine ended first."""
        batches = self._disk.batches
        row = await self._disk.run(batches.row, batch_id)
        if row["status"] == "validating" and not await self._validate(batch_id, row["input_file_id"], row["endpoint"]):
            return True
        engine_ended = False
        expires_in = row["expires_at"] - self._clock()
        with trio.CancelScope() as interrupted, trio.move_on_after(max(0.0, expires_in)) as expired:
            self._current = (batch_id, interrupted)
            if (await self._disk.run(batches.row, batch_id))["status"] != "cancelling":
                engine_ended = await self._answer_lines(batch_id, row)
        self._current = None
        if engine_ended:
            return False
        status = (await self._disk.run(batches.row, batch_id))["status"]
        if status == "cancelling":
            await self._disk.run(batches.finish, batch_id, "cancelled", _unanswered("batch_cancelled"))
        elif expired.cancelled_caught:
            await self._disk.run(batches.finish, batch_id, "expired", _unanswered("batch_expired"))
        else:
            await self._disk.run(batches.finish, batch_id, "completed", _unanswered("batch_incomplete"))
        logger.info("batch %s has ended", batch_id)
        return True

    # --- validation ---------------------------------------------------------------------------------------------

    async def _validate(self, batch_id: str, file_id: str, endpoint: str) -> bool:
        """Make the batch's work list, or fail the batch with the reasons."""

        def work() -> bool:
            try:
                with self._disk.files.open(file_id) as file:
                    lines = _Validation(file, endpoint)
                    total = self._disk.batches.add_lines(batch_id, lines)
            except OSError:
                lines = None
                errors = [LineError("missing_file", "The input file no longer exists.", param="input_file_id")]
            except _InvalidFileError as error:
                errors = error.errors
            else:
                if total:
                    return True
                errors = [LineError("empty_file", "The input file has no lines.", param="input_file_id")]
            self._disk.batches.fail(batch_id, errors)
            return False

        return await self._disk.run(work)

    # --- answering ----------------------------------------------------------------------------------------------

    async def _answer_lines(self, batch_id: str, row: sqlite3.Row) -> bool:
        """Answer every pending line; True if the engine ended first. Cancelling it loses nothing that was answered."""
        room = trio.Semaphore(self._max_in_flight)
        send, receive = trio.open_memory_channel[LineRecord](self._max_in_flight)
        engine_ended = False

        async def answer(line: PendingLine, text: bytes, records: trio.MemorySendChannel[LineRecord]) -> None:
            nonlocal engine_ended
            with records:
                try:
                    records.send_nowait(await answer_line(self._execute, line, text, row["endpoint"], row["owner"]))
                except (DrainingError, EngineDeadError):
                    engine_ended = True
                    nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._commit, batch_id, receive, room)
            with send, self._disk.files.open(row["input_file_id"]) as file:
                after = -1
                while lines := await self._disk.run(self._next_lines, batch_id, after, file):
                    for line, text in lines:
                        await room.acquire()
                        nursery.start_soon(answer, line, text, send.clone())
                    after = lines[-1][0].line
        return engine_ended

    async def _commit(
        self, batch_id: str, records: trio.MemoryReceiveChannel[LineRecord], room: trio.Semaphore
    ) -> None:
        """Commit answers as they come, as many at once as have come."""
        group: list[LineRecord] = []
        with records:
            try:
                async for record in records:
                    group = [record, *_queued(records)]
                    await self._disk.run(self._disk.batches.record, batch_id, group)
                    for _ in group:
                        room.release()
                    group = []
            finally:
                # What was answered counts, also where the batch is cancelled or the server stops; recording twice
                # changes nothing.
                if group := [*group, *_queued(records)]:
                    with trio.CancelScope(shield=True):
                        await self._disk.run(self._disk.batches.record, batch_id, group)

    def _next_lines(self, batch_id: str, after: int, file: BinaryIO) -> list[tuple[PendingLine, bytes]]:
        lines = self._disk.batches.pending(batch_id, after_line=after, limit=_READ_AHEAD)
        return [(line, read_line(file, line)) for line in lines]


async def answer_line(execute: Execute, line: PendingLine, text: bytes, endpoint: str, owner: str) -> LineRecord:
    """Answer one line of a batch as OpenAI's output files spell it; raises only what ends the engine."""
    status, body = 200, None
    while body is None:
        try:
            body = await execute(endpoint, json.loads(text)["body"], owner)
        except (DrainingError, EngineDeadError):
            raise
        except OverloadedError as error:
            await trio.sleep(error.retry_after_s)  # Live requests come first.
        except Exception as error:  # a line's failure is the line's alone
            told = to_http_error(error)
            if told.status == 500:
                logger.error("a batch line failed", exc_info=error)
            status, body = told.status, error_object(told)
    usage: dict[str, Any] = body.get("usage") or {}
    details: dict[str, int] = usage.get("prompt_tokens_details") or {}
    record = {
        "id": f"batch_req_{secrets.token_hex(16)}",
        "custom_id": line.custom_id,
        "response": {"status_code": status, "request_id": f"req-{secrets.token_hex(12)}", "body": body},
        "error": None,
    }
    return LineRecord(
        line.line,
        msgspec.json.encode(record),
        failed=status != 200,
        prompt_tokens=usage.get("prompt_tokens", 0),
        cached_tokens=details.get("cached_tokens", 0),
        completion_tokens=usage.get("completion_tokens", 0),
    )


def _queued(records: trio.MemoryReceiveChannel[LineRecord]) -> list[LineRecord]:
    group: list[LineRecord] = []
    with suppress(trio.WouldBlock, trio.EndOfChannel):
        while len(group) < _COMMIT_GROUP:
            group.append(records.receive_nowait())
    return group


_REASONS = {
    "batch_cancelled": "The batch was cancelled before this request was answered.",
    "batch_expired": "The batch expired before this request was answered.",
    "batch_incomplete": "This request was not answered.",
}


def _unanswered(code: str) -> Callable[[PendingLine], bytes]:
    def record(line: PendingLine) -> bytes:
        return msgspec.json.encode(
            {
                "id": f"batch_req_{secrets.token_hex(16)}",
                "custom_id": line.custom_id,
                "response": None,
                "error": {"code": code, "message": _REASONS[code]},
            }
        )

    return record


class _InvalidFileError(Exception):
    """The input file is not a batch."""

    def __init__(self, errors: list[LineError]) -> None:
        super().__init__()
        self.errors = errors


class _Validation:
    """Reads an input file line by line and yields the work list; never holds more than a line.

    Raises:
        _InvalidFileError: At the end, with what is wrong; at once when there is too much of it.
    """

    def __init__(self, file: BinaryIO, endpoint: str) -> None:
        self._file = file
        self._endpoint = endpoint
        self._errors: list[LineError] = []
        self._custom_ids: set[str] = set()

    def __iter__(self) -> Iterator[PendingLine]:
        position = count = 0
        for number in range(1, MAX_LINES * 2):
            text = self._file.readline(MAX_LINE_BYTES + 1)
            if not text:
                break
            start, position = position, position + len(text)
            if not text.strip():
                continue
            count += 1
            if count > MAX_LINES:
                self._errors.append(LineError("too_many_lines", f"A batch has at most {MAX_LINES} requests."))
                break
            custom_id = self._check(number, text)
            if custom_id is not None and not self._errors:
                yield PendingLine(number - 1, custom_id, start, len(text))
            if len(self._errors) >= _MAX_REPORTED_ERRORS or len(text) > MAX_LINE_BYTES:
                break
        if self._errors:
            raise _InvalidFileError(self._errors)

    def _check(self, number: int, text: bytes) -> str | None:
        """Return the line's custom_id, or note what is wrong with it."""

        def wrong(code: str, message: str, param: str | None = None) -> None:
            self._errors.append(LineError(code, message, number, param))

        if len(text) > MAX_LINE_BYTES:
            return wrong("line_too_long", f"Line {number} is longer than {MAX_LINE_BYTES} bytes.")
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            return wrong("invalid_json_line", f"Invalid request on line {number}: it is not valid JSON.")
        if not isinstance(line, dict):
            return wrong("invalid_request", f"Invalid request on line {number}: it is not a JSON object.")
        request = cast("dict[str, Any]", line)
        custom_id = request.get("custom_id")
        if (
            not isinstance(custom_id, str)
            or not 0 < len(custom_id) <= _MAX_CUSTOM_ID_CHARS
            or not _is_unicode(custom_id)
        ):
            return wrong(
                "invalid_request", f"Line {number} has no custom_id (a string that is not empty).", "custom_id"
            )
        if custom_id in self._custom_ids:
            return wrong("duplicate_custom_id", f"The custom_id of line {number} was used before.", "custom_id")
        self._custom_ids.add(custom_id)
        if request.get("method") != "POST":
            return wrong("invalid_method", f"Line {number}: the method must be POST.", "method")
        if request.get("url") != self._endpoint:
            return wrong("mismatched_url", f"Line {number}: the url must be {self._endpoint}, the batch's.", "url")
        if not isinstance(request.get("body"), dict):
            return wrong("invalid_request", f"Line {number}: the body must be a JSON object.", "body")
        if request["body"].get("stream"):
            return wrong("invalid_request", f"Line {number}: a batch cannot stream.", "body.stream")
        return custom_id


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
