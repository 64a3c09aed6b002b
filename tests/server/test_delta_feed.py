"""What the reader of a streamed answer gets if tokens and the end of it come together."""

from __future__ import annotations

from typing import Any, cast

import pytest
import trio
import trio.testing

from tests.engine.fakes import FakeTokenizer
from trio_llm.engine.mailbox import Mailbox
from trio_llm.engine.request_times import RequestTimes
from trio_llm.engine.stream import Stream
from trio_llm.errors import RequestFailedError
from trio_llm.messages import Failed, Finished, Tokens, Usage
from trio_llm.params import SamplingParams, Submission
from trio_llm.server.errors import HttpError
from trio_llm.server.generation.respond import _Paced
from trio_llm.server.http.deadline import Deadline
from trio_llm.server.http.edge import Lifetime
from trio_llm.server.http.sse import DeltaFeed


class Reader:
    """The feed of one stream, and the mailbox that the engine puts its events into."""

    def __init__(self, nursery: trio.Nursery, interval: int = 1, deadline: Deadline | None = None) -> None:
        self.mailbox = Mailbox(lambda _: None)
        tokenizer: Any = FakeTokenizer()
        stream = Stream(
            1, Submission((1, 2, 3), SamplingParams(max_tokens=9)), tokenizer.decode, self.mailbox, RequestTimes(0.0)
        )
        lifetime = Lifetime(nursery, cast(Any, None))
        source = stream if interval == 1 else _Paced(stream, interval)
        self.feed = DeltaFeed([source], lifetime, deadline or Deadline(), 0)

    async def tokens(self) -> int:
        """Return the number of tokens that come next."""
        return sum(len(delta.token_ids) for _, delta in await self.feed.next() or [])


@pytest.mark.parametrize("interval", [1, 5])
async def test_a_failure_that_comes_with_a_token_is_told_after_it(nursery: trio.Nursery, interval: int) -> None:
    """Also where a chunk should have more tokens: a reader that waited for them would never be woken."""
    reader = Reader(nursery, interval)
    reader.mailbox.put(Tokens((1,)))
    assert await reader.tokens() == 1
    reader.mailbox.put(Tokens((2,)))
    reader.mailbox.put(Failed(RequestFailedError("broken")))
    assert await reader.tokens() == 1
    with pytest.raises(RequestFailedError):
        await reader.tokens()


@pytest.mark.parametrize("ends", [True, False])
async def test_what_came_before_the_deadline_is_sent(
    nursery: trio.Nursery, mock_clock: trio.testing.MockClock, ends: bool
) -> None:
    """Even if an event loop that stood still sees both at once. Only an answer that goes on is too late."""
    reader = Reader(nursery, deadline=Deadline.after(trio.current_time(), 5))
    await trio.testing.wait_all_tasks_blocked()
    reader.mailbox.put(Tokens((1, 2)))
    if ends:
        reader.mailbox.put(Finished("length", Usage(3, 2, 0)))
    mock_clock.jump(6)
    await trio.testing.wait_all_tasks_blocked()
    assert await reader.tokens() == 2
    if ends:
        assert await reader.tokens() == 0
    else:
        with pytest.raises(HttpError, match="longer than 5 s"):
            await reader.tokens()
