"""Batches through the runner, on a real disk, with a stand-in for the engine."""

from __future__ import annotations

import json
import sqlite3
import time
from collections import Counter
from pathlib import Path

import pytest
import trio
import trio.testing
from prometheus_client import CollectorRegistry

from trio_llm.config import LimitsConfig
from trio_llm.errors import DrainingError, InvalidRequestError, OverloadedError
from trio_llm.server.background import Background
from trio_llm.server.batches.batch_store import ENDED, BatchStore
from trio_llm.server.batches.disk import Disk
from trio_llm.server.batches.input_file import MAX_LINES, line_body
from trio_llm.server.batches.runner import BatchRunner

ENDPOINT = "/v1/completions"


class Bench:
    """A data directory and what runs on it."""

    def __init__(self, directory: Path) -> None:
        self.disk = Disk(str(directory))
        self.disk.open()
        self.files, self.batches = self.disk.files, self.disk.batches

    def runner(self, execute, max_in_flight: int = 4, **options) -> BatchRunner:
        async def prompt_of(endpoint: str, text: bytes, owner: str):
            return await execute(endpoint, json.loads(line_body(text)), owner)

        standard = {"keep_running": Background(CollectorRegistry()).keep_running, "is_ending": lambda: False}
        limits = {"max_in_flight": max_in_flight, "limits": LimitsConfig(), "clock": time.time}
        return BatchRunner(self.disk, prompt_of, **{**standard, **limits, **options})

    def submit(self, data: bytes, window_s: int = 86_400, owner: str = "") -> str:
        with self.files.create("in.jsonl", "batch", owner=owner) as writer:
            writer.write(data)
            file_id = writer.commit().id
        return self.batches.create(
            input_file_id=file_id,
            endpoint=ENDPOINT,
            completion_window="24h",
            window_s=window_s,
            metadata={},
            owner=owner,
        )["id"]

    def lines(self, batch_id: str, kind: str) -> list[dict]:
        file_id = self.batches.get(batch_id)[f"{kind}_file_id"]
        return [json.loads(line) for line in self.files.path(file_id).read_bytes().splitlines()] if file_id else []


@pytest.fixture(name="bench")
def _bench(tmp_path: Path):
    bench = Bench(tmp_path)
    yield bench
    bench.disk.close()


def request_line(number: int, **changes) -> bytes:
    """Return one line of an input file."""
    line = {"custom_id": f"c{number}", "method": "POST", "url": ENDPOINT, "body": {"prompt": str(number)}, **changes}
    return json.dumps(line).encode() + b"\n"


def input_file(count: int) -> bytes:
    """Return an input file of so many lines."""
    return b"".join(request_line(number) for number in range(count))


async def echo(endpoint: str, body, owner: str):
    """Answer with the prompt."""
    await trio.lowlevel.checkpoint()
    return {"echo": body["prompt"], "usage": {"prompt_tokens": 2, "completion_tokens": 1}}


async def ended(bench: Bench, batch_id: str, poll_s: float = 0) -> dict:
    """Wait until a batch has ended."""
    while (row := await bench.disk.run(bench.batches.row, batch_id))["status"] not in ENDED:  # noqa: ASYNC110 - no event tells of the disk
        await trio.sleep(poll_s)
    batch = bench.batches.get(batch_id, row["owner"])
    assert batch is not None
    return batch


async def run_to_end(bench: Bench, runner: BatchRunner, *batch_ids: str, poll_s: float = 0) -> list[dict]:
    """Run until these batches have ended; return them."""
    with trio.fail_after(30 + 1000 * poll_s):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(runner.run)
            batches = [await ended(bench, batch_id, poll_s) for batch_id in batch_ids]
            nursery.cancel_scope.cancel()
    return batches


async def test_every_line_is_answered_once_and_in_order(bench: Bench) -> None:
    """The output file holds each line's answer once, in input order, and the counts and usage add up."""
    batch_id = bench.submit(input_file(150))
    (batch,) = await run_to_end(bench, bench.runner(echo), batch_id)
    output = bench.lines(batch_id, "output")
    assert [line["custom_id"] for line in output] == [f"c{i}" for i in range(150)]
    assert all(line["response"]["body"]["echo"] == line["custom_id"][1:] for line in output)
    assert batch["request_counts"] == {"total": 150, "completed": 150, "failed": 0}
    assert batch["usage"]["total_tokens"] == 450 and batch["error_file_id"] is None


async def test_no_more_lines_run_at_once_than_allowed(bench: Bench) -> None:
    """The engine never sees more lines than max_in_flight, whatever the batch's size."""
    running = peak = 0

    async def execute(endpoint: str, body, owner: str):
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        for _ in range(3):
            await trio.lowlevel.checkpoint()
        running -= 1
        return {}

    await run_to_end(bench, bench.runner(execute, max_in_flight=3), bench.submit(input_file(40)))
    assert peak == 3


async def test_a_bad_line_fails_alone(bench: Bench) -> None:
    """What the endpoint refuses, or fails on, stands in the error file with its status; the others are answered."""

    async def execute(endpoint: str, body, owner: str):
        if body["prompt"] == "1":
            raise InvalidRequestError("No.", param="prompt")
        if body["prompt"] == "2":
            raise RuntimeError("a secret")
        return await echo(endpoint, body, owner)

    batch_id = bench.submit(input_file(4))
    (batch,) = await run_to_end(bench, bench.runner(execute), batch_id)
    assert batch["request_counts"] == {"total": 4, "completed": 2, "failed": 2}
    refused, broken = bench.lines(batch_id, "error")
    assert (refused["custom_id"], refused["response"]["status_code"]) == ("c1", 400)
    assert refused["response"]["body"]["error"]["param"] == "prompt"
    assert broken["response"]["status_code"] == 500 and "secret" not in json.dumps(broken)


async def test_a_full_queue_only_delays_a_line(bench: Bench) -> None:
    """Live requests come first: a line that finds no room is tried again, and is not a failed line."""
    refusals = 5

    async def execute(endpoint: str, body, owner: str):
        nonlocal refusals
        if refusals:
            refusals -= 1
            raise OverloadedError("full", retry_after_s=0)
        return await echo(endpoint, body, owner)

    (batch,) = await run_to_end(bench, bench.runner(execute), bench.submit(input_file(3)))
    assert batch["request_counts"]["completed"] == 3


async def test_a_stopped_server_goes_on_where_it_was(bench: Bench) -> None:
    """Draining leaves lines pending; the next runner answers exactly those."""
    seen: Counter[str] = Counter()
    enough = 7

    async def draining(endpoint: str, body, owner: str):
        if seen.total() >= enough:
            raise DrainingError
        answer = await echo(endpoint, body, owner)
        seen[body["prompt"]] += 1
        return answer

    batch_id = bench.submit(input_file(20))
    with trio.fail_after(30):
        await bench.runner(draining).run()
    assert bench.batches.get(batch_id)["request_counts"]["completed"] == seen.total() >= enough

    async def counted(endpoint: str, body, owner: str):
        seen[body["prompt"]] += 1
        return await echo(endpoint, body, owner)

    await run_to_end(bench, bench.runner(counted), batch_id)
    assert len(bench.lines(batch_id, "output")) == 20
    assert set(seen.values()) == {1}


async def test_cancelling_keeps_what_was_answered(bench: Bench) -> None:
    """A cancelled batch ends at once, with its answers in the output file and all other lines accounted for."""
    answered = trio.Event()

    async def execute(endpoint: str, body, owner: str):
        if int(body["prompt"]) < 2:
            return await echo(endpoint, body, owner)
        answered.set()
        return await trio.sleep_forever()

    batch_id = bench.submit(input_file(10))
    runner = bench.runner(execute)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(runner.run)
            await answered.wait()
            await bench.disk.run(bench.batches.cancel, batch_id)
            runner.interrupt(batch_id)
            batch = await ended(bench, batch_id)
            nursery.cancel_scope.cancel()
    assert batch["status"] == "cancelled"
    assert [line["custom_id"] for line in bench.lines(batch_id, "output")] == ["c0", "c1"]
    errors = bench.lines(batch_id, "error")
    assert len(errors) == 8 and {line["error"]["code"] for line in errors} == {"batch_cancelled"}


async def test_a_batch_past_its_time_expires(bench: Bench) -> None:
    """After its window a batch ends as expired, with the reason on every line without an answer."""
    batch_id = bench.submit(input_file(3), window_s=-1)
    (batch,) = await run_to_end(bench, bench.runner(echo), batch_id)
    assert batch["status"] == "expired"
    assert {line["error"]["code"] for line in bench.lines(batch_id, "error")} == {"batch_expired"}


async def test_a_batch_whose_time_ends_after_its_last_answer_is_completed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, mock_clock: trio.testing.MockClock
) -> None:
    """Where no line is without an answer, nothing has expired."""
    real = bench.batches.record

    def record(*args) -> None:
        real(*args)
        trio.from_thread.run_sync(mock_clock.jump, 100_000)

    monkeypatch.setattr(bench.batches, "record", record)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.runner(echo).run)
        batch = await ended(bench, bench.submit(input_file(1)))
        nursery.cancel_scope.cancel()
    assert (batch["status"], batch["request_counts"]["completed"]) == ("completed", 1)


async def test_a_file_that_goes_while_its_batch_runs(bench: Bench) -> None:
    """The batch ends as failed and keeps its answers: no retry brings the file back."""

    async def execute(endpoint: str, body, owner: str):
        path.unlink(missing_ok=True)
        return await echo(endpoint, body, owner)

    batch_id = bench.submit(input_file(3))
    path = bench.files.path(bench.batches.row(batch_id)["input_file_id"])
    (batch,) = await run_to_end(bench, bench.runner(execute, max_in_flight=1), batch_id)
    assert (batch["status"], batch["errors"]["data"][0]["code"]) == ("failed", "missing_file")
    assert [line["custom_id"] for line in bench.lines(batch_id, "output")] == ["c0"]
    assert [line["error"]["code"] for line in bench.lines(batch_id, "error")] == ["missing_file"] * 2


async def test_a_file_that_is_no_longer_needed_may_go(bench: Bench) -> None:
    """A batch whose lines are all read needs its input file no more."""

    async def execute(endpoint: str, body, owner: str):
        path.unlink()
        return await echo(endpoint, body, owner)

    batch_id = bench.submit(input_file(1))
    path = bench.files.path(bench.batches.row(batch_id)["input_file_id"])
    (batch,) = await run_to_end(bench, bench.runner(execute, max_in_flight=1), batch_id)
    assert batch["status"] == "completed"


@pytest.mark.parametrize(
    ("data", "code", "line"),
    [
        (b"", "empty_file", None),
        (b"\n \n", "empty_file", None),
        (request_line(0) + b"{", "invalid_json_line", 2),
        (b"[" * 100_000, "invalid_json_line", 1),
        (b"\xff\n", "invalid_json_line", 1),
        (b"[]\n", "invalid_request", 1),
        (request_line(0, custom_id=""), "invalid_request", 1),
        (request_line(0, custom_id="\ud800"), "invalid_request", 1),
        (request_line(0) * 2, "duplicate_custom_id", 2),
        (request_line(0, method="GET"), "invalid_method", 1),
        (request_line(0, url="/v1/other"), "mismatched_url", 1),
        (request_line(0, body=[]), "invalid_request", 1),
        (request_line(0, body={"stream": True}), "invalid_request", 1),
        (b'"' + b"x" * 3_000_000, "line_too_long", 1),
        (b"".join(request_line(number) for number in range(MAX_LINES + 1)), "too_many_lines", None),
    ],
)
async def test_a_file_that_is_no_batch_fails_with_the_line(bench: Bench, data: bytes, code: str, line) -> None:
    """Validation names what is wrong and where; nothing of such a batch runs."""

    async def execute(endpoint: str, body, owner: str):
        raise AssertionError("it ran")

    batch_id = bench.submit(data)
    (batch,) = await run_to_end(bench, bench.runner(execute), batch_id)
    assert batch["status"] == "failed"
    assert (batch["errors"]["data"][0]["code"], batch["errors"]["data"][0]["line"]) == (code, line)


async def test_new_batches_are_noticed(bench: Bench) -> None:
    """A batch that comes when all others have ended is worked off without a restart."""
    runner = bench.runner(echo)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(runner.run)
            await ended(bench, bench.submit(input_file(2)))
            later = bench.submit(request_line(9))
            runner.notify()
            await ended(bench, later)
            nursery.cancel_scope.cancel()
    assert bench.batches.get(later)["request_counts"]["completed"] == 1


async def test_a_failing_disk_ends_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an answer cannot be stored, the batch waits and goes on later; the server lives."""
    monkeypatch.setattr("trio_llm.server.batches.runner._DISK_RETRY_S", 0)
    real, failures = bench.batches.record, 2

    def record(*args) -> None:
        nonlocal failures
        if failures:
            failures -= 1
            raise sqlite3.OperationalError("database or disk is full")
        real(*args)

    monkeypatch.setattr(bench.batches, "record", record)
    (batch,) = await run_to_end(bench, bench.runner(echo), bench.submit(input_file(5)))
    assert batch["request_counts"]["completed"] == 5 and failures == 0


async def test_an_answer_that_comes_as_its_batch_is_cancelled_counts(bench: Bench) -> None:
    """A line that ends in spite of the cancellation is neither lost nor the end of the server."""
    begun, last = trio.Event(), trio.Event()

    async def execute(endpoint: str, body, owner: str):
        begun.set()
        with trio.CancelScope(shield=True):
            await last.wait()
        return {}

    batch_id = bench.submit(input_file(1))
    runner = bench.runner(execute)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(runner.run)
            await begun.wait()
            await bench.disk.run(bench.batches.cancel, batch_id)
            runner.interrupt(batch_id)
            await trio.testing.wait_all_tasks_blocked()
            last.set()
            batch = await ended(bench, batch_id)
            nursery.cancel_scope.cancel()
    assert (batch["status"], batch["request_counts"]["completed"]) == ("cancelled", 1)


async def test_a_wait_that_ends_while_it_is_looked_at_is_not_for_ever(bench: Bench) -> None:
    """An owner who may go on a moment after it was told to wait gets its places without another event."""
    waits_s = iter([1e-9])
    runner = bench.runner(echo, wait_s=lambda _: next(waits_s, 0.0))
    (batch,) = await run_to_end(bench, runner, bench.submit(input_file(3)))
    assert batch["request_counts"]["completed"] == 3


async def test_places_that_come_too_late_are_given_back(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a batch gets while it reads its last line does not stay with it until that is answered."""
    first, last, begun = trio.Event(), trio.Event(), trio.Semaphore(0)
    real = bench.batches.pending

    async def execute(endpoint: str, body, owner: str):
        {"first": first, "last": last}.get(owner, trio.Event()).set()
        begun.release()
        return await trio.sleep_forever()

    runner = bench.runner(execute, max_in_flight=3)

    async def free_a_place() -> None:
        runner.interrupt(ids["first"])
        await trio.testing.wait_all_tasks_blocked()

    def pending(batch_id: str, **options):
        if batch_id == ids.get("last"):
            trio.from_thread.run(free_a_place)
        return real(batch_id, **options)

    monkeypatch.setattr(bench.batches, "pending", pending)
    ids = {"first": bench.submit(input_file(1), owner="first")}
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(runner.run)
            for owner, lines in (("last", 1), ("others", 2)):
                await (first if owner == "last" else last).wait()
                ids[owner] = bench.submit(input_file(lines), owner=owner)
                runner.notify()
            for _ in range(4):
                await begun.acquire()
            nursery.cancel_scope.cancel()


async def test_a_batch_that_fails_for_no_known_reason_fails_alone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, mock_clock: trio.testing.MockClock
) -> None:
    """A fault of ours in one batch is shown and tried again later; the other batches go on meanwhile."""
    background = Background(CollectorRegistry())
    ids = [bench.submit(input_file(3)), bench.submit(input_file(3))]
    real = bench.batches.pending

    def pending(batch_id: str, **options):
        if batch_id == ids[0] and not mock_clock.current_time():
            raise ZeroDivisionError
        return real(batch_id, **options)

    monkeypatch.setattr(bench.batches, "pending", pending)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.runner(echo, keep_running=background.keep_running).run)
        await ended(bench, ids[1])
        await trio.testing.wait_all_tasks_blocked()
        assert bench.batches.get(ids[0])["status"] == "in_progress" and background.is_failing
        mock_clock.jump(2)
        batch = await ended(bench, ids[0])
        nursery.cancel_scope.cancel()
    assert batch["request_counts"]["completed"] == 3


async def test_a_batch_that_always_fails_ends(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, mock_clock: trio.testing.MockClock
) -> None:
    """It ends as failed with the answers it has, also where these cannot be written; health is well again later."""
    background = Background(CollectorRegistry())
    lost, kept = bench.submit(input_file(2)), bench.submit(input_file(2))
    answer_lines, finish = BatchRunner._answer_lines, BatchStore.finish

    async def fail_later(self: BatchRunner, batch) -> None:
        await answer_lines(self, batch)
        raise ZeroDivisionError

    def finish_one(self: BatchStore, batch_id: str, *args) -> None:
        if batch_id == lost:
            raise ZeroDivisionError
        finish(self, batch_id, *args)

    monkeypatch.setattr(BatchRunner, "_answer_lines", fail_later)
    monkeypatch.setattr(BatchStore, "finish", finish_one)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.runner(echo, keep_running=background.keep_running).run)
        while await bench.disk.run(bench.batches.unfinished):
            mock_clock.jump(60)
        nursery.cancel_scope.cancel()
    batches = [bench.batches.get(batch_id) for batch_id in (lost, kept)]
    assert [batch["status"] for batch in batches] == ["failed", "failed"]
    assert [batch["errors"]["data"][0]["code"] for batch in batches] == ["server_error"] * 2
    assert batches[0]["output_file_id"] is None and batches[1]["output_file_id"] is not None
    mock_clock.jump(120)
    assert not background.is_failing


async def test_a_runner_that_failed_runs_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failure `run` begins anew, with all places free and every pending line to do."""
    waits = iter([1, 0])

    def wait_s(owner: str) -> float:
        return 1 / next(waits, 1) - 1

    runner = bench.runner(echo, wait_s=wait_s)
    batch_id = bench.submit(input_file(10))
    with trio.fail_after(30), pytest.raises(ExceptionGroup):
        await runner.run()
    (batch,) = await run_to_end(bench, runner, batch_id)
    assert batch["request_counts"]["completed"] == 10


async def test_a_line_that_fails_while_the_engine_ends_is_not_answered(bench: Bench) -> None:
    """Whatever a line fails with in a server that ends, the next start answers it."""

    async def execute(endpoint: str, body, owner: str):
        if body["prompt"] == "3":
            raise trio.ClosedResourceError
        return await trio.sleep_forever()

    batch_id = bench.submit(input_file(5))
    with trio.fail_after(30):
        await bench.runner(execute, is_ending=lambda: True).run()
    assert bench.batches.get(batch_id)["request_counts"] == {"total": 5, "completed": 0, "failed": 0}
    (batch,) = await run_to_end(bench, bench.runner(echo), batch_id)
    assert batch["request_counts"]["completed"] == 5
