"""Run batches: every line of an input file uses the same engine as live requests, behind them in the queue.

Each batch has a task, and one more task gives them slots in the engine in turn. A line is read when it has a slot, so
memory does not grow with the batch. Answers are committed in groups before a client can see them. If the server stops
at any time, unanswered lines stay pending, and the next start answers them.
"""

from __future__ import annotations

import logging
import math
import secrets
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import attrs
import msgspec
import trio

from trio_llm.config import LimitsConfig
from trio_llm.errors import DrainingError, EngineDeadError, OverloadedError, StorageError
from trio_llm.server.batches.batch_store import LineError, LineRecord, PendingLine, read_line
from trio_llm.server.batches.disk import Disk
from trio_llm.server.batches.fair_queue import FairQueue
from trio_llm.server.batches.input_file import InputLines, InvalidInputError
from trio_llm.server.errors import error_object, to_http_error

logger = logging.getLogger(__name__)

_BATCHES_PER_OWNER = 8
_COMMIT_GROUP = 256
_DISK_RETRY_S = 30.0
# With the pauses between them, two minutes: more than a moment without memory lasts. A guess.
_MAX_FAILURES = 8
_MISSING_FILE = LineError("missing_file", "The input file no longer exists.", param="input_file_id")

Execute = Callable[[str, bytes, str], Awaitable[Mapping[str, Any]]]
"""(endpoint, text of the line, owner) -> the answer's body; raises what the endpoint raises."""
KeepRunning = Callable[[str, Callable[[], Awaitable[None]]], Awaitable[None]]
"""Runs a named task until it returns, again after a failure; see `Background.keep_running`."""


@attrs.define(eq=False)
class _Batch:
    """A running batch.

    Attributes:
        granted: Slots for which no line is read yet.
        places: All its slots, also of lines that are being answered or committed.
        last_line: The last line that was read.
    """

    id: str
    owner: str
    endpoint: str
    input_file_id: str
    granted: trio.Semaphore = attrs.field(factory=lambda: trio.Semaphore(0))
    places: int = 0
    last_line: int = -1


class BatchRunner:
    """Runs batches until cancelled, or until the engine refuses requests because it ends.

    Args:
        execute: Answers one line; must be safe to cancel.
        keep_running: Supervises a batch: its failure is its own.
        is_ending: Whether the engine shuts down or is dead, so that a failure may not be the line's.
        max_in_flight: Maximum of lines at once, over all batches.
        limits: Limits of a line.
        clock: Unix seconds.
        wait_s: Returns the seconds that an owner's lines must wait, 0 for none.
    """

    def __init__(
        self,
        disk: Disk,
        execute: Execute,
        *,
        keep_running: KeepRunning,
        is_ending: Callable[[], bool],
        max_in_flight: int,
        limits: LimitsConfig,
        clock: Callable[[], float],
        wait_s: Callable[[str], float] = lambda _: 0.0,
    ) -> None:
        self._disk = disk
        self._execute = execute
        self._keep_running = keep_running
        self._is_ending = is_ending
        self._max_in_flight = max_in_flight
        self._limits = limits
        self._clock = clock
        self._wait_s = wait_s
        self._start()

    def _start(self) -> None:
        """Reset the state of a previous run that failed."""
        self._wake = trio.Event()
        self._owners: dict[str, str] = {}
        self._scopes: dict[str, trio.CancelScope] = {}
        self._free = self._max_in_flight
        self._turns: FairQueue[_Batch] = FairQueue()
        self._changed = trio.lowlevel.ParkingLot()
        self._end = trio.CancelScope()

    def notify(self) -> None:
        """Announce a new batch."""
        self._wake.set()

    def interrupt(self, batch_id: str) -> None:
        """Cancel the lines in flight of a batch that was cancelled."""
        if batch_id in self._scopes:
            self._scopes[batch_id].cancel()
        self.notify()

    async def run(self) -> None:
        """Run all batches and wait for more, until the engine ends."""
        self._start()
        with self._end:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._give_places)
                while True:
                    self._wake = trio.Event()
                    for batch_id, owner in await self._unfinished():
                        # More batches of this owner would only share its turns.
                        active = Counter(self._owners.values())[owner]
                        if batch_id not in self._owners and active < _BATCHES_PER_OWNER:
                            self._owners[batch_id] = owner
                            nursery.start_soon(self._work, batch_id)
                    await self._wake.wait()
        logger.info("the engine ends; batches continue after the next start")

    async def _unfinished(self) -> list[tuple[str, str]]:
        while True:
            try:
                return await self._disk.run(self._disk.batches.unfinished)
            except StorageError:
                await _disk_failed("the list of batches")

    async def _work(self, batch_id: str) -> None:
        failures = 0

        async def run() -> None:
            nonlocal failures
            try:
                await self._outlast_disk(batch_id)
            except Exception as error:
                failures += 1
                if failures < _MAX_FAILURES:
                    raise
                logger.critical("batch %s fails each time and ends here", batch_id, exc_info=error)
                await self._give_up(batch_id)

        await self._keep_running("batches", run)
        logger.info("batch %s has ended", batch_id)
        del self._owners[batch_id]
        self.notify()

    async def _give_up(self, batch_id: str) -> None:
        """End a batch as failed, with its answers if they can be written."""
        batches = self._disk.batches
        errors = [LineError("server_error", "The server failed on this batch repeatedly; its log has the reason.")]
        try:
            await self._disk.run(batches.finish, batch_id, "failed", _unanswered("batch_failed"), errors)
        except Exception:  # noqa: BLE001 - whatever fails each time may be this
            await self._disk.run(batches.fail, batch_id, errors)

    async def _outlast_disk(self, batch_id: str) -> None:
        """Run a batch to its end, retrying when the disk fails."""
        ended = False
        while not ended:
            try:
                await self._bring_to_end(batch_id)
                ended = True
            except* StorageError:
                await _disk_failed(f"batch {batch_id}")

    async def _bring_to_end(self, batch_id: str) -> None:
        batches = self._disk.batches
        row = await self._disk.run(batches.row, batch_id)
        if row["status"] == "validating" and not await self._validate(batch_id, row["input_file_id"], row["endpoint"]):
            return
        batch = _Batch(batch_id, row["owner"], row["endpoint"], row["input_file_id"])
        expires_in, is_missing = row["expires_at"] - self._clock(), False
        with trio.CancelScope() as interrupted, trio.move_on_after(max(0.0, expires_in)) as expired:
            self._scopes[batch_id] = interrupted
            try:
                if (await self._disk.run(batches.row, batch_id))["status"] != "cancelling":
                    await self._answer_lines(batch)
            except* InvalidInputError:  # No retry brings the file back.
                is_missing = True
            finally:
                del self._scopes[batch_id]
        status = (await self._disk.run(batches.row, batch_id))["status"]
        # The time may be over after the last answer; then nothing has expired.
        pending = await self._disk.run(partial(batches.pending, batch_id, after_line=-1, limit=1))
        if status == "cancelling":
            await self._disk.run(batches.finish, batch_id, "cancelled", _unanswered("batch_cancelled"))
        elif is_missing:
            await self._disk.run(batches.finish, batch_id, "failed", _unanswered("missing_file"), [_MISSING_FILE])
        elif expired.cancelled_caught and pending:
            await self._disk.run(batches.finish, batch_id, "expired", _unanswered("batch_expired"))
        else:
            await self._disk.run(batches.finish, batch_id, "completed", _unanswered("batch_incomplete"))

    async def _validate(self, batch_id: str, file_id: str, endpoint: str) -> bool:
        """Write the batch's list of lines, or fail the batch with the errors."""

        def work() -> bool:
            try:
                with self._disk.files.open(file_id) as file:
                    total = self._disk.batches.add_lines(batch_id, InputLines(file, endpoint, self._limits))
            except FileNotFoundError:
                errors = [_MISSING_FILE]
            except InvalidInputError as error:
                errors = error.errors
            else:
                if total:
                    return True
                errors = [LineError("empty_file", "The input file has no lines.", param="input_file_id")]
            self._disk.batches.fail(batch_id, errors)
            return False

        return await self._disk.run(work)

    # --- places in the engine -----------------------------------------------------------------------------------

    async def _give_places(self) -> None:
        """Give places away as they become free, and as owners may go on that had to wait."""
        while True:
            # Asked once: who must wait now and no more a moment later would be given nothing, and not be waited for.
            waits_s = {owner: self._wait_s(owner) for owner in self._turns.owners}
            ready = frozenset(owner for owner, wait_s in waits_s.items() if wait_s <= 0)
            while self._free and (batch := self._turns.next(ready.__contains__)) is not None:
                self._free -= 1
                batch.places += 1
                batch.granted.release()
            ends_s = [wait_s for owner, wait_s in waits_s.items() if owner not in ready]
            with trio.move_on_after(min(ends_s) if ends_s and self._free else math.inf):
                await self._changed.park()

    def _give_back(self, batch: _Batch, places: int) -> None:
        batch.places -= places
        self._free += places
        self._changed.unpark_all()

    async def _next_lines(self, batch: _Batch) -> tuple[list[tuple[PendingLine, bytes]], bool]:
        """Wait for slots; return a line for each, and whether there are no more lines."""
        await batch.granted.acquire()
        count = 1
        with suppress(trio.WouldBlock):
            while True:
                batch.granted.acquire_nowait()
                count += 1

        def read() -> list[tuple[PendingLine, bytes]]:
            lines = self._disk.batches.pending(batch.id, after_line=batch.last_line, limit=count)
            if not lines:
                return []
            try:
                with self._disk.files.open(batch.input_file_id) as file:
                    return [(line, read_line(file, line)) for line in lines]
            except FileNotFoundError:
                raise InvalidInputError([_MISSING_FILE]) from None

        lines = await self._disk.run(read)
        if lines:
            batch.last_line = lines[-1][0].line
        if exhausted := len(lines) < count:
            self._turns.remove(batch.owner, batch)
            # This includes slots that it got while reading.
            self._give_back(batch, count - len(lines) + batch.granted.value)
        return lines, exhausted

    # --- answering ----------------------------------------------------------------------------------------------

    async def _answer_lines(self, batch: _Batch) -> None:
        """Answer every pending line. Cancellation loses no finished answers."""
        send, receive = trio.open_memory_channel[LineRecord](self._max_in_flight)

        async def answer(line: PendingLine, text: bytes, records: trio.MemorySendChannel[LineRecord]) -> None:
            with records:
                try:
                    record = await answer_line(self._execute, line, text, batch.endpoint, batch.owner)
                except (DrainingError, EngineDeadError):
                    self._end.cancel()
                    return
                if record.failed and self._is_ending():
                    self._end.cancel()  # The failure may be the engine's; the next start retries the line.
                else:
                    records.send_nowait(record)

        self._turns.add(batch.owner, batch)
        self._changed.unpark_all()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._commit, batch, receive)
                with send:
                    exhausted = False
                    while not exhausted:
                        lines, exhausted = await self._next_lines(batch)
                        for line, text in lines:
                            nursery.start_soon(answer, line, text, send.clone())
        finally:
            self._turns.remove(batch.owner, batch)
            self._give_back(batch, batch.places)
            # Finished answers count, also if the batch is cancelled or the server stops.
            with receive, trio.CancelScope(shield=True):
                while group := _queued(receive):
                    await self._disk.run(self._disk.batches.record, batch.id, group)

    async def _commit(self, batch: _Batch, records: trio.MemoryReceiveChannel[LineRecord]) -> None:
        """Commit answers as they arrive, all that have arrived at once."""
        async for record in records:
            group = [record, *_queued(records)]
            with trio.CancelScope(shield=True):
                await self._disk.run(self._disk.batches.record, batch.id, group)
            self._give_back(batch, len(group))


async def _disk_failed(what: str) -> None:
    logger.error("the data directory fails; %s goes on in %s s", what, _DISK_RETRY_S)
    await trio.sleep(_DISK_RETRY_S)


async def answer_line(execute: Execute, line: PendingLine, text: bytes, endpoint: str, owner: str) -> LineRecord:
    """Answer one line in the format of OpenAI's output files. A line that fails gives a record too.

    Raises:
        DrainingError: The engine shuts down; the line is not answered.
        EngineDeadError: The engine is dead; the line is not answered.
    """
    while True:
        try:
            return _record(line, 200, await execute(endpoint, text, owner))
        except (DrainingError, EngineDeadError):
            raise
        except OverloadedError as error:
            await trio.sleep(error.retry_after_s)  # Live requests come first.
        except Exception as error:  # a failure affects only its line
            failure = to_http_error(error)
            if failure.status == 500:
                logger.error("a batch line failed", exc_info=error)
            return _record(line, failure.status, msgspec.to_builtins(error_object(failure)))


def _record(line: PendingLine, status: int, body: Mapping[str, Any]) -> LineRecord:
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
    "missing_file": "The input file no longer exists.",
    "batch_failed": "The server failed on the batch before this request was answered.",
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
