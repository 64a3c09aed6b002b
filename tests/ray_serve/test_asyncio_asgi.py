"""An app on Trio answers requests that come from asyncio. No Ray here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from trio_llm.bridge import Bridge
from trio_llm.errors import EngineDeadError
from trio_llm.ray_serve.asyncio_asgi import answer_on_trio

DEADLINE_S = 30.0


@pytest.fixture
def bridge() -> Iterator[Bridge[None]]:
    """A Trio run in a thread."""

    @asynccontextmanager
    async def nothing() -> AsyncIterator[None]:
        yield

    with Bridge(nothing) as bridge:
        yield bridge


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run on asyncio, and do not wait for ever."""
    asyncio.run(asyncio.wait_for(main(), DEADLINE_S))


def test_each_message_passes_at_once(bridge: Bridge[None]) -> None:
    """The app gets the second part of the body only after the client has the first part of the answer."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for _ in range(2):
            await send({"type": "http.response.body", "body": (await receive())["body"], "more_body": True})

    async def main() -> None:
        to_app: asyncio.Queue[Any] = asyncio.Queue()
        got: list[bytes] = []

        async def send(message: Any) -> None:
            got.append(message["body"])
            to_app.put_nowait({"type": "http.request", "body": b"two", "more_body": False})

        to_app.put_nowait({"type": "http.request", "body": b"one", "more_body": True})
        await answer_on_trio(bridge, app, {}, to_app.get, send)
        assert got == [b"one", b"two"]

    run(main)


def test_a_cancelled_task_cancels_the_app(bridge: Bridge[None]) -> None:
    """The app's task ends by cancellation, and not before."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        began, ended = asyncio.Event(), asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            loop.call_soon_threadsafe(began.set)
            try:
                await trio.sleep_forever()
            except trio.Cancelled:
                loop.call_soon_threadsafe(ended.set)
                raise

        task = asyncio.create_task(answer_on_trio(bridge, app, {}, asyncio.Event().wait, _unexpected))
        await began.wait()
        assert not ended.is_set()
        task.cancel()
        await ended.wait()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main)


def test_a_connection_that_is_lost_is_a_disconnect(bridge: Bridge[None]) -> None:
    """Also where the proxy that held it has died, and its messages with it."""

    async def main() -> None:
        messages: list[Any] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            messages.append(await receive())

        async def lost() -> Any:
            raise ConnectionError

        await answer_on_trio(bridge, app, {}, lost, _unexpected)
        assert messages == [{"type": "http.disconnect"}]

    run(main)


def test_what_the_app_raises_is_raised(bridge: Bridge[None]) -> None:
    """The caller learns of it, and the bridge goes on."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise ValueError("the app")

    async def main() -> None:
        for _ in range(2):
            with pytest.raises(ValueError, match="the app"):
                await answer_on_trio(bridge, app, {}, asyncio.Event().wait, _unexpected)

    run(main)


def test_a_bridge_that_has_ended_says_so() -> None:
    """A request to it is an error at once, and whoever waits for its end is called."""
    ended: list[str] = []

    @asynccontextmanager
    async def failing() -> AsyncIterator[trio.Event]:
        fail = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail_at, fail)
            yield fail

    async def fail_at(event: trio.Event) -> None:
        await event.wait()
        raise RuntimeError("the engine")

    bridge = Bridge(failing)
    bridge.when_ended(lambda: ended.append("ended"))
    bridge.post(bridge.value.set)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await trio.sleep_forever()

    async def main() -> None:
        with pytest.raises(EngineDeadError):
            await answer_on_trio(bridge, app, {}, asyncio.Event().wait, _unexpected)

    run(main)
    with pytest.raises(ExceptionGroup):
        bridge.close()
    assert ended == ["ended"]


async def _unexpected(message: Any) -> None:
    pytest.fail(f"nothing was to be sent, but {message} was")
