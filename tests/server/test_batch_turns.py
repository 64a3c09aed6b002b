"""Several batches at once: whose line is next, who must wait, and how little is held. No threads, so no luck either."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from tests.server.test_batch_runner import Bench, echo, ended, input_file, request_line, run_to_end
from trio_llm.config import AuthConfig
from trio_llm.server.access.rate_limits import RateLimits
from trio_llm.server.batches import runner as batch_runner
from trio_llm.server.batches.disk import Disk
from trio_llm.server.batches.fair_queue import FairQueue

T = TypeVar("T")


class InlineDisk(Disk):
    """Calls where it is called, so that the clock of a test jumps only where everybody waits."""

    async def run(self, call: Callable[..., T], *args: Any) -> T:
        await trio.lowlevel.checkpoint()
        return self.call(call, *args)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    """Open a data directory without threads."""
    bench = Bench(tmp_path)
    bench.disk.__class__ = InlineDisk
    yield bench
    bench.disk.close()


def tagged(tag: str, count: int) -> bytes:
    """Return an input file whose prompts tell which one it is."""
    return b"".join(request_line(number, body={"prompt": tag}) for number in range(count))


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 4)), min_size=1, unique=True), st.integers(1, 60))
def test_turns_are_fair(batches: list[tuple[str, int]], rounds: int) -> None:
    """No owner gets two turns more than another one, nor a batch than another of its owner."""
    turns: FairQueue[tuple[str, int]] = FairQueue()
    for batch in batches:
        turns.add(batch[0], batch)
    got = [turns.next(lambda _: True) for _ in range(rounds)]
    by_owner = {owner: sum(batch is not None and batch[0] == owner for batch in got) for owner, _ in batches}
    assert max(by_owner.values()) - min(by_owner.values()) <= 1
    for owner in by_owner:
        counts = [got.count(batch) for batch in batches if batch[0] == owner]
        assert max(counts) - min(counts) <= 1


def test_who_may_not_go_keeps_its_turn() -> None:
    """Others go on without an owner that must wait; with nobody who may go there is no turn."""
    turns: FairQueue[str] = FairQueue()
    for owner in "ab":
        turns.add(owner, owner + "1")
    assert [turns.next(lambda owner: owner == "b") for _ in range(3)] == ["b1"] * 3
    assert turns.next(lambda _: True) == "a1"
    assert turns.next(lambda _: False) is None
    turns.remove("a", "a1")
    turns.remove("a", "a1")
    assert turns.owners == ("b",)


async def test_owners_and_their_batches_alternate(bench: Bench) -> None:
    """Two owners get every second line each, and one owner's two batches share its half, whatever came first."""
    order: list[str] = []
    everybody = trio.Event()

    async def execute(endpoint: str, body: Any, owner: str) -> dict[str, Any]:
        order.append(body["prompt"])
        await everybody.wait()
        return {}

    batch_ids = [bench.submit(tagged(tag, 40), owner=tag[0]) for tag in ("a1", "a2", "b1")]
    runner = bench.runner(execute, max_in_flight=1)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(runner.run)
            await trio.testing.wait_all_tasks_blocked()
            assert len(order) == 1
            everybody.set()
            for batch_id in batch_ids:
                await ended(bench, batch_id)
            nursery.cancel_scope.cancel()
    shared = order[1:61]
    assert {tuple(tag[0] for tag in shared[at : at + 2]) for at in range(0, 60, 2)} in ({("a", "b")}, {("b", "a")})
    first_owners = [tag for tag in shared if tag[0] == "a"]
    assert first_owners in (["a1", "a2"] * 15, ["a2", "a1"] * 15)
    assert [order.count(tag) for tag in ("a1", "a2", "b1")] == [40, 40, 40]


async def test_many_places_are_shared_too(bench: Bench) -> None:
    """A batch that comes late gets its share of the places that a long one has held, however they become free."""
    order: list[str] = []

    async def execute(endpoint: str, body: Any, owner: str) -> dict[str, Any]:
        order.append(body["prompt"])
        return await echo(endpoint, body, owner)

    long = bench.submit(tagged("long", 2000))
    runner = bench.runner(execute, max_in_flight=32)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(runner.run)
            while len(order) < 100:
                await trio.lowlevel.checkpoint()
            short = bench.submit(tagged("short", 50))
            runner.notify()
            await ended(bench, short)
            begun = order.index("short")
            assert order[begun:].index("short") == 0 and order.count("short") == 50
            last = len(order) - 1 - order[::-1].index("short")
            assert last - begun < 50 * 2 + 3 * 32
            nursery.cancel_scope.cancel()
    assert bench.batches.get(long)["status"] == "in_progress"


async def test_an_owners_batches_beyond_eight_wait(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many batches of an owner run at once and no more; the next one follows when one has ended."""
    monkeypatch.setattr(batch_runner, "_BATCHES_PER_OWNER", 2)
    going = trio.Event()

    async def execute(endpoint: str, body: Any, owner: str) -> dict[str, Any]:
        await going.wait()
        return {}

    batch_ids = [bench.submit(tagged("x", 3)) for _ in range(3)] + [bench.submit(tagged("y", 3), owner="y")]
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(bench.runner(execute).run)
            await trio.testing.wait_all_tasks_blocked()
            status = [bench.batches.row(batch_id)["status"] for batch_id in batch_ids]
            assert status == ["in_progress", "in_progress", "validating", "in_progress"]
            going.set()
            assert (await ended(bench, batch_ids[2]))["request_counts"]["completed"] == 3
            nursery.cancel_scope.cancel()


async def test_lines_wait_for_their_owners_tokens(bench: Bench, autojump_clock: MockClock) -> None:
    """Lines are charged as they run and wait, and never fail, while the bucket is empty; other owners go on."""
    limits = RateLimits(AuthConfig(rate_limit_tokens=10, rate_limit_window_secs=10), trio.current_time)
    ran: dict[str, list[float]] = {"poor": [], "rich": []}

    async def execute(endpoint: str, body: Any, owner: str) -> dict[str, Any]:
        ran[owner].append(round(trio.current_time() - start_s, 3))
        limits.charge(owner, 5 if owner == "poor" else 0)
        return {}

    batch_ids = [bench.submit(input_file(6), owner=owner) for owner in ("poor", "rich")]
    start_s = trio.current_time()
    runner = bench.runner(execute, max_in_flight=1, wait_s=limits.wait_s)
    batches = await run_to_end(bench, runner, *batch_ids, poll_s=1)
    assert ran == {"poor": [0, 0, 1, 6, 11, 16], "rich": [0] * 6}
    assert {batch["request_counts"]["completed"] for batch in batches} == {6}


async def test_a_batch_expires_in_the_middle(bench: Bench, autojump_clock: MockClock) -> None:
    """What is answered when the window ends is kept; lines in flight and after are told that the batch expired."""

    async def execute(endpoint: str, body: Any, owner: str) -> dict[str, Any]:
        await trio.sleep(25)
        return {}

    began, start_s = int(time.time()), trio.current_time()
    batch_id = bench.submit(input_file(5), window_s=60)

    def clock() -> float:
        return began + trio.current_time() - start_s

    runner = bench.runner(execute, max_in_flight=1, clock=clock)
    (batch,) = await run_to_end(bench, runner, batch_id, poll_s=1)
    assert batch["status"] == "expired"
    assert batch["request_counts"] == {"total": 5, "completed": 2, "failed": 3}
    assert [line["custom_id"] for line in bench.lines(batch_id, "output")] == ["c0", "c1"]
    errors = bench.lines(batch_id, "error")
    assert [(line["custom_id"], line["error"]["code"]) for line in errors] == [
        (f"c{number}", "batch_expired") for number in (2, 3, 4)
    ]


async def test_a_batch_without_its_file_delays_no_other(bench: Bench, autojump_clock: MockClock) -> None:
    """Where one batch's file cannot be read any more, the others run to their end, and it fails with what it has."""
    held = trio.Event()

    async def execute(endpoint: str, body: Any, owner: str) -> dict[str, Any]:
        held.set()
        await trio.sleep(1)
        return {}

    began, start_s = int(time.time()), trio.current_time()
    lost, other = bench.submit(input_file(20)), bench.submit(input_file(20))
    runner = bench.runner(execute, max_in_flight=2, clock=lambda: began + trio.current_time() - start_s)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(runner.run)
        await held.wait()
        bench.files.path(bench.batches.row(lost)["input_file_id"]).unlink()
        while bench.batches.row(other)["status"] != "completed":  # noqa: ASYNC110 - no event tells of the disk
            await trio.sleep(1)
        assert trio.current_time() - start_s < 100
        assert bench.batches.row(lost)["status"] == "failed"
        nursery.cancel_scope.cancel()
    counts = bench.batches.get(lost)["request_counts"]
    assert counts["completed"] > 0 and counts["completed"] + counts["failed"] == 20


async def test_no_line_is_read_before_its_place(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all batches together, no more lines are held than may run at once."""
    held = peak = 0
    real = bench.batches.pending

    def pending(batch_id: str, *, after_line: int, limit: int) -> Any:
        nonlocal held, peak
        lines = real(batch_id, after_line=after_line, limit=limit)
        held += len(lines)
        peak = max(peak, held)
        return lines

    async def execute(endpoint: str, body: Any, owner: str) -> dict[str, Any]:
        nonlocal held
        await trio.lowlevel.checkpoint()
        held -= 1
        return {}

    monkeypatch.setattr(bench.batches, "pending", pending)
    batch_ids = [bench.submit(input_file(100), owner=owner) for owner in "ab"]
    await run_to_end(bench, bench.runner(execute, max_in_flight=6), *batch_ids)
    assert peak == 6


async def test_memory_does_not_grow_with_the_file(bench: Bench) -> None:
    """Two thousand lines of 8 KB, validated, answered with as much and written out, hold a small part of their size."""
    text = "x" * 8192

    async def execute(endpoint: str, body: Any, owner: str) -> dict[str, Any]:
        return {"text": body["prompt"]}

    batch_id = bench.submit(b"".join(request_line(number, body={"prompt": text}) for number in range(2000)))
    tracemalloc.start()
    try:
        await run_to_end(bench, bench.runner(execute, max_in_flight=16), batch_id)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert bench.files.path(bench.batches.get(batch_id)["output_file_id"]).stat().st_size > 16_000_000
    assert peak < 2_000_000
