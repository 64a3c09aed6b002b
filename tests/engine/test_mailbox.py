"""A request's mailbox: nothing is lost or delivered twice, and its reader always learns why it waits in vain."""

from __future__ import annotations

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from trio_llm.engine.mailbox import Mailbox
from trio_llm.errors import EngineDeadError
from trio_llm.messages import Event, FinishReason, Started, Tokens

A, B = Started(0), Tokens((1,))


class Left:
    """Remembers with what reason a reader left."""

    def __init__(self) -> None:
        self.reasons: list[FinishReason | None] = []

    def __call__(self, reason: FinishReason | None) -> None:
        self.reasons.append(reason)


async def test_a_reader_gets_what_has_come_and_waits_for_more(nursery: trio.Nursery) -> None:
    """Events that came before are returned together, in order; then the reader sleeps until the next."""
    mailbox, got = Mailbox(Left()), list[list[Event]]()

    async def read() -> None:
        while True:
            got.append(await mailbox.receive())

    mailbox.put(A)
    mailbox.put(B)
    nursery.start_soon(read)
    await wait_all_tasks_blocked()
    assert got == [[A, B]]
    mailbox.put(B)
    await wait_all_tasks_blocked()
    assert got == [[A, B], [B]]
    nursery.cancel_scope.cancel()


async def test_reading_can_be_cancelled_and_loses_nothing() -> None:
    """Receiving is a checkpoint even if events are there, and one that is cancelled takes none of them."""
    mailbox = Mailbox(Left())
    mailbox.put(A)
    with trio.move_on_after(0) as scope:
        await mailbox.receive()
    assert scope.cancelled_caught
    assert mailbox.take() == [A]
    with trio.move_on_after(0) as scope:
        await mailbox.receive()
    mailbox.put(B)
    assert scope.cancelled_caught
    assert await mailbox.receive() == [B]


async def test_no_reader_waits_for_an_engine_that_has_ended(nursery: trio.Nursery) -> None:
    """After the last event a reader gets an error; one that waits already is woken by it."""
    early, late = Mailbox(Left()), Mailbox(Left())

    async def read() -> None:
        with pytest.raises(EngineDeadError):
            await early.receive()

    nursery.start_soon(read)
    await wait_all_tasks_blocked()
    early.end()
    late.put(A)
    late.end()
    assert await late.receive() == [A]
    with pytest.raises(EngineDeadError):
        await late.receive()


@pytest.mark.parametrize("ended", [False, True])
async def test_closing_wakes_the_reader_and_says_why_once(nursery: trio.Nursery, ended: bool) -> None:
    """Whoever waits gets an error, later events are lost, and the reason counts only while the request runs."""
    left = Left()
    mailbox = Mailbox(left)

    async def read() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await mailbox.receive()

    nursery.start_soon(read)
    await wait_all_tasks_blocked()
    mailbox.ended = ended
    mailbox.close("abort")
    mailbox.put(A)
    mailbox.close("stop")
    with pytest.raises(trio.ClosedResourceError):
        mailbox.take()
    assert left.reasons == [None if ended else "abort"]


async def test_one_reader_may_wait_for_several(nursery: trio.Nursery) -> None:
    """Mailboxes that share a wakeup wake their reader once, whichever of them gets something."""
    first, second, wakes = Mailbox(Left()), Mailbox(Left()), 0
    second.wakeup = first.wakeup

    async def read() -> None:
        nonlocal wakes
        while True:
            await first.wakeup.park()
            wakes += 1

    nursery.start_soon(read)
    await wait_all_tasks_blocked()
    second.put(A)
    first.put(B)
    await wait_all_tasks_blocked()
    assert (wakes, first.take(), second.take()) == (1, [B], [A])
    nursery.cancel_scope.cancel()
