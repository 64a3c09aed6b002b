"""Time runs out, or only seems to: the deadline of a request, and comments that keep a silent stream alive."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import trio
import trio.testing
from trio.testing import wait_all_tasks_blocked

from tests.server.client import use_client
from tests.server.helpers import Answer, Exchange, ask, exchange, running
from tests.server.stub import GatedWorker, StubRunner, continuation, open_stub
from trio_llm.config import Config, LimitsConfig, ServerConfig
from trio_llm.engine import Engine
from trio_llm.server.app import create_app

LIMITS = LimitsConfig(request_timeout_s=60)
MESSAGES: Any = [{"role": "user", "content": "hi"}]
CALLS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "hello", "max_tokens": 50},
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 50},
    "/v1/responses": {"model": "stub", "input": "hi", "max_output_tokens": 50},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 50, "model": "stub"},
    "/v1/embeddings": {"input": ["a", "b"]},
}
KEEP_ALIVE = b": keep-alive\n\n"


@pytest.fixture
async def worker() -> GatedWorker:
    """Return a model that stands still."""
    return GatedWorker()


@pytest.fixture
async def engine(worker: GatedWorker) -> AsyncIterator[Engine]:
    """Open an engine round it."""
    async with open_stub(StubRunner(), worker=worker) as engine:
        yield engine


def start(engine: Engine, nursery: trio.Nursery, path: str, keep_alive_s: float = 0, **fields: Any) -> Exchange:
    """Send a request."""
    server = ServerConfig(sse_keep_alive_interval=keep_alive_s, served_model_name=("stub",))
    app = create_app(engine, Config(limits=LIMITS, server=server))
    call = exchange(app, "POST", path, json.dumps({**CALLS[path], **fields}).encode())
    nursery.start_soon(call.run)
    return call


async def submitted(engine: Engine) -> None:
    """Wait until the engine has a request: its template is rendered in a thread, which no clock waits for."""
    while not engine.health().num_running + engine.health().num_waiting:
        await trio.lowlevel.checkpoint()
    await wait_all_tasks_blocked()


async def is_idle(engine: Engine, worker: GatedWorker) -> bool:
    """Let the engine take the steps it has, and say whether nothing is left in it."""
    worker.open = True
    worker.let(10)
    await wait_all_tasks_blocked()
    return engine.health().num_running + engine.health().num_waiting == 0


@pytest.mark.parametrize("path", CALLS)
async def test_what_takes_too_long_is_aborted(
    engine: Engine, worker: GatedWorker, nursery: trio.Nursery, mock_clock: trio.testing.MockClock, path: str
) -> None:
    """At its deadline a request is a 504 that says so and is not to be retried, and the engine is rid of it."""
    call = start(engine, nursery, path)
    await submitted(engine)
    mock_clock.jump(59)
    await wait_all_tasks_blocked()
    assert call.status == 0
    mock_clock.jump(2)
    error = json.loads(await call.body())["error"]
    assert (call.status, error["type"], call.headers["x-should-retry"]) == (504, "timeout_error", "false")
    assert "60 s (--request-timeout)" in error["message"]
    assert await is_idle(engine, worker)
    assert 'vllm:request_success_total{engine="0",finished_reason="abort"' in (await engine.render_metrics()).decode()


@pytest.mark.parametrize("more", [{}, {"n": 2}, {"stream_interval": 3}])
async def test_a_stream_that_takes_too_long_ends_in_words(
    engine: Engine, worker: GatedWorker, nursery: trio.Nursery, mock_clock: trio.testing.MockClock, more: Any
) -> None:
    """A stream under way ends at the deadline with an error event and [DONE]; what came before it stands."""
    call = start(engine, nursery, "/v1/completions", stream=True, **more)
    worker.let(4)
    data = await call.chunks.receive()
    await wait_all_tasks_blocked()
    mock_clock.jump(61)
    *chunks, error, done = Answer(200, {}, data + await call.body()).events()
    assert chunks
    assert (error["error"]["code"], done) == ("request_timeout", "[DONE]")
    assert await is_idle(engine, worker)


@pytest.mark.parametrize(
    ("path", "more"),
    [
        *((path, {}) for path in list(CALLS)[:4]),
        *(("/v1/completions", more) for more in ({"n": 2}, {"stream_interval": 4})),
    ],
)
async def test_silence_is_filled_with_comments(
    engine: Engine,
    worker: GatedWorker,
    nursery: trio.Nursery,
    mock_clock: trio.testing.MockClock,
    path: str,
    more: dict[str, Any],
) -> None:
    """Each interval without a token is a comment; chunks go out at once, whole, and as they would without."""
    call = start(engine, nursery, path, 10, stream=True, **more)
    chunks: list[bytes] = []

    async def read() -> None:
        async for chunk in call.chunks:
            chunks.append(chunk)  # noqa: PERF401 - looked at while they come

    async def seen(steps: int, seconds: float) -> list[bytes]:
        """Let the model and then the clock go on, and return what came meanwhile."""
        before = len(chunks)
        worker.let(steps)
        await wait_all_tasks_blocked()
        mock_clock.jump(seconds)
        await wait_all_tasks_blocked()
        return chunks[before:]

    await submitted(engine)
    nursery.start_soon(read)
    assert await seen(0, 9) == []
    assert call.status == 0
    assert await seen(0, 2) == [KEEP_ALIVE]
    assert call.status == 200
    assert KEEP_ALIVE not in await seen(4, 0)
    # With stream_interval, tokens that wait for more of them are not lost to a comment.
    assert [KEEP_ALIVE] in [(await seen(1, 11))[-1:] for _ in range(3)]
    worker.open = True
    await seen(100, 0)
    if path == "/v1/completions":
        events = Answer(200, {}, b"".join(chunks).replace(KEEP_ALIVE, b"")).events()[:-1]
        texts = ["", ""]
        for event in events:
            texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
        assert texts[0] == continuation("hello", 50)


async def test_without_an_interval_there_are_no_comments(
    engine: Engine, worker: GatedWorker, nursery: trio.Nursery, mock_clock: trio.testing.MockClock
) -> None:
    """By default a stream is silent as long as its model is."""
    call = start(engine, nursery, "/v1/completions", stream=True)
    await wait_all_tasks_blocked()
    mock_clock.jump(50)
    await wait_all_tasks_blocked()
    assert call.status == 0
    worker.open = True
    worker.let(100)
    assert KEEP_ALIVE not in await call.body()


async def test_refusals_stay_statuses(engine: Engine, mock_clock: trio.testing.MockClock) -> None:
    """What is wrong with a request is known before any comment, and an ordinary 400."""
    app = create_app(engine, Config(server=ServerConfig(sse_keep_alive_interval=0.001)))
    assert (await ask(app, "POST", "/v1/completions", {"prompt": "x", "stream": True, "n": 0})).status == 400


async def test_openais_client_skips_comments() -> None:
    """The real client's stream has the whole answer, and nothing of the comments that came before it."""
    worker = GatedWorker()
    async with open_stub(StubRunner(), worker=worker) as engine:
        app = create_app(engine, Config(server=ServerConfig(sse_keep_alive_interval=0.01)))
        comments = 0
        inner = app.asgi_app

        async def counting(scope: Any, receive: Any, send: Any) -> None:
            async def count(message: Any) -> None:
                nonlocal comments
                comments += message.get("body") == KEEP_ALIVE
                if comments == 3:  # Only now does the model begin.
                    worker.open = True
                    worker.let(100)
                await send(message)

            await inner(scope, receive, count)

        def use(client: openai.OpenAI) -> list[str]:
            stream = client.completions.create(model="stub", prompt="hello", max_tokens=5, stream=True)
            return [chunk.choices[0].text for chunk in stream]

        async with running(counting) as server:
            texts = await use_client(server, use)
    assert comments >= 3
    assert "".join(texts) == continuation("hello", 5)
