"""Streams in time: when the first byte goes out, what a slow or leaving reader means, and how a stream ends early."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import attrs
import pytest
import trio
import trio.testing

from tests.server.helpers import Answer, Exchange, ask, exchange, http, read_to_end, running
from tests.server.stub import TOKENIZER, GatedWorker, StubRunner, continuation, open_stub
from trio_llm.config import Config, LimitsConfig
from trio_llm.engine import Engine
from trio_llm.server.app import ServerApp, create_app

BODY = b'{"prompt": "hello", "max_tokens": 50, "stream": true}'
CHAT = b'{"messages": [{"role": "user", "content": "hi"}], "max_tokens": 50, "stream": true}'
MANY = b'{"prompt": ["hello", "you"], "n": 2, "max_tokens": 50, "stream": true}'


@attrs.frozen
class Bench:
    """A server whose model takes a step only when the test lets it."""

    app: ServerApp
    engine: Engine
    runner: StubRunner
    worker: GatedWorker

    def num_running(self) -> int:
        health = self.engine.health()
        return health.num_running + health.num_waiting


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    """Return one."""
    runner, worker = StubRunner(), GatedWorker()
    async with open_stub(runner, worker=worker) as engine:
        # Tests move the clock further than any request may take.
        app = create_app(engine, Config(limits=LimitsConfig(request_timeout_s=0)))
        yield Bench(app, engine, runner, worker)


def start(bench: Bench, nursery: trio.Nursery, path: str = "/v1/completions", body: bytes = BODY) -> Exchange:
    """Send a request."""
    call = exchange(bench.app, "POST", path, body)
    nursery.start_soon(call.run)
    return call


async def test_nothing_is_sent_before_the_first_token(bench: Bench, nursery: trio.Nursery) -> None:
    """Neither status nor role goes out while the prompt is computed; then both come with the first token, at once."""
    call = start(bench, nursery, "/v1/chat/completions", CHAT)
    await trio.testing.wait_all_tasks_blocked()
    assert call.status == 0
    bench.worker.let(2)
    first = await call.chunks.receive()
    assert call.status == 200
    events = Answer(200, {}, first).events()
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert events[1]["choices"][0]["delta"]["content"]
    bench.worker.open = True
    bench.worker.let(100)
    await call.body()


async def test_what_is_refused_late_is_still_a_status(bench: Bench, nursery: trio.Nursery) -> None:
    """A failure before the first token of a stream is an HTTP error, not an event."""
    bench.runner.hook = lambda plan: 1 / 0
    bench.worker.let(100)
    call = start(bench, nursery)
    await call.body()
    assert call.status == 500


async def test_a_slow_reader_gets_more_at_a_time(bench: Bench, nursery: trio.Nursery) -> None:
    """What has queued since the last write goes out in one event, and no token is lost."""
    call = start(bench, nursery)
    bench.worker.let(1000)
    await trio.testing.wait_all_tasks_blocked()
    events = Answer(200, {}, await call.body()).events()
    texts = [event["choices"][0]["text"] for event in events[:-1]]
    assert "".join(texts) == continuation("hello", 50)
    assert len(texts) < 10


class TaskSteps(trio.abc.Instrument):
    """Counts how often a task runs."""

    def __init__(self) -> None:
        self.count = 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.count += 1


async def test_a_step_wakes_a_request_once(bench: Bench, nursery: trio.Nursery) -> None:
    """A step of the model makes as many tasks run for four samples as for one, and their chunks are one write."""
    counts: list[int] = []
    for body, samples in (BODY, 1), (MANY, 4):
        call = start(bench, nursery, body=body)
        bench.worker.let(8)
        await call.chunks.receive()
        await trio.testing.wait_all_tasks_blocked()
        with suppress(trio.WouldBlock):
            while True:
                call.chunks.receive_nowait()
                await trio.testing.wait_all_tasks_blocked()
        steps = TaskSteps()
        trio.lowlevel.add_instrument(steps)
        bench.worker.let(1)
        await trio.testing.wait_all_tasks_blocked()
        trio.lowlevel.remove_instrument(steps)
        counts.append(steps.count)
        events = Answer(200, {}, call.chunks.receive_nowait()).events()
        indices = [event["choices"][0]["index"] for event in events]
        assert indices == list(range(samples))
        call.disconnect()
        bench.worker.let(8)
        await trio.testing.wait_all_tasks_blocked()
    assert counts[0] == counts[1]


@pytest.mark.parametrize("body", [BODY, MANY], ids=["one", "many"])
@pytest.mark.parametrize("moment", ["before", "during", "unread"])
async def test_a_client_that_leaves_frees_its_requests(
    bench: Bench, nursery: trio.Nursery, body: bytes, moment: str
) -> None:
    """Hanging up before the first token, while reading or while not reading ends every sample by the next plan."""
    call = start(bench, nursery, body=body)
    await trio.testing.wait_all_tasks_blocked()
    if moment != "before":
        bench.worker.let(3)
        await call.chunks.receive()
        if moment == "unread":
            bench.worker.let(3)
            await trio.testing.wait_all_tasks_blocked()
    assert bench.num_running() > 0
    call.disconnect()
    await trio.testing.wait_all_tasks_blocked()
    num_plans = len(bench.runner.plans)
    bench.worker.let(100)
    await trio.testing.wait_all_tasks_blocked()
    assert bench.num_running() == 0
    # One step was at the gate, and one planned behind it.
    assert not any(plan.request_ids for plan in bench.runner.plans[num_plans + 2 :])


async def test_a_client_that_leaves_a_whole_answer_frees_it(bench: Bench, nursery: trio.Nursery) -> None:
    """Hanging up on an answer that is not streamed ends it as well."""
    call = start(bench, nursery, body=BODY.replace(b"true", b"false"))
    bench.worker.let(3)
    await trio.testing.wait_all_tasks_blocked()
    assert bench.num_running() == 1
    call.disconnect()
    await trio.testing.wait_all_tasks_blocked()
    bench.worker.let(100)
    await trio.testing.wait_all_tasks_blocked()
    assert bench.num_running() == 0


async def test_one_bad_prompt_of_many_leaves_nothing_behind(bench: Bench, nursery: trio.Nursery) -> None:
    """When a later prompt is refused, the earlier ones of the same request do not run on."""
    answer = await ask(bench.app, "POST", "/v1/completions", {"prompt": ["a", "x" * 600]})
    assert answer.status == 400
    bench.worker.let(100)
    await trio.testing.wait_all_tasks_blocked()
    assert bench.num_running() == 0


async def test_a_failure_in_the_middle_is_an_event(bench: Bench, nursery: trio.Nursery) -> None:
    """After the first token a failure is an error event, then [DONE]; what came before it stands."""
    call = start(bench, nursery)
    bench.worker.let(3)
    first = await call.chunks.receive()
    bench.runner.hook = lambda plan: 1 / 0
    bench.worker.let(100)
    *chunks, error, done = Answer(200, {}, first + await call.body()).events()
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == continuation("hello", 50)[: len(chunks)]
    assert error["error"]["type"] == "internal_server_error"
    assert done == "[DONE]"


async def test_one_sample_that_fails_ends_the_stream_of_all(bench: Bench, nursery: trio.Nursery) -> None:
    """Samples that share a stream share its end: the error is an event and the others are aborted."""
    call = start(bench, nursery, body=MANY)
    bench.worker.let(4)
    first = await call.chunks.receive()
    victims: set[int] = set()

    def fail_one(plan: Any) -> None:
        victims.update(plan.request_ids[:1] if not victims else ())
        if victims & set(plan.request_ids):
            raise RuntimeError

    bench.runner.hook = fail_one
    bench.worker.let(1000)
    *_, error, done = Answer(200, {}, first + await call.body()).events()
    assert (error["error"]["code"], done) == ("request_failed", "[DONE]")
    await trio.testing.wait_all_tasks_blocked()
    assert bench.num_running() == 0


@pytest.mark.parametrize("body", [BODY, MANY], ids=["one", "many"])
async def test_the_last_call_ends_streams_in_words(bench: Bench, nursery: trio.Nursery, body: bytes) -> None:
    """When draining takes too long an open stream ends with an error event and [DONE], not in the middle of nothing."""
    call = start(bench, nursery, body=body)
    bench.worker.let(4)
    first = await call.chunks.receive()
    await trio.testing.wait_all_tasks_blocked()
    bench.app.last_call()
    *_, error, done = Answer(200, {}, first + await call.body()).events()
    assert (error["error"]["code"], done) == ("draining", "[DONE]")


async def test_the_last_call_answers_whole_requests_too(bench: Bench, nursery: trio.Nursery) -> None:
    """A request that is not streamed is told 503 when draining takes too long."""
    call = start(bench, nursery, body=BODY.replace(b"true", b"false"))
    await trio.testing.wait_all_tasks_blocked()
    bench.app.last_call()
    assert b"draining" in await call.body()
    assert call.status == 503


async def test_streams_outlive_every_default_timeout(
    bench: Bench, nursery: trio.Nursery, mock_clock: trio.testing.MockClock
) -> None:
    """L3: a stream whose tokens are minutes apart goes on; Quart's default ends it after one, without a word."""
    call = start(bench, nursery)
    bench.worker.let(2)
    data = await call.chunks.receive()
    for _ in range(3):
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(600)
        bench.worker.let(1)
        data += await call.chunks.receive()
    bench.worker.let(1000)
    events = Answer(200, {}, data + await call.body()).events()
    assert "".join(event["choices"][0]["text"] for event in events[:-1]) == continuation("hello", 50)


async def test_draining_lets_streams_finish(bench: Bench) -> None:
    """L13: after the trigger a stream goes on to its [DONE] over a real socket, and only then does serve() end."""
    async with running(bench.app, last_call=bench.app.last_call) as server:
        stream = await server.connect()
        await stream.send_all(http("POST", "/v1/completions", BODY, "Content-Type: application/json"))
        bench.worker.let(3)
        data = await stream.receive_some()
        bench.engine.drain()
        server.stop.set()
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert not server.stopped.is_set()
        bench.worker.let(1000)
        data += await read_to_end(stream)
        assert b"data: [DONE]\n\n" in data
        await server.stopped.wait()


async def test_draining_that_takes_too_long_says_so(bench: Bench) -> None:
    """A stream that outlives the grace ends with an error event and [DONE] over a real socket."""
    async with running(bench.app, last_call=bench.app.last_call, graceful_timeout_s=0.01) as server:
        stream = await server.connect()
        await stream.send_all(http("POST", "/v1/completions", BODY, "Content-Type: application/json"))
        bench.worker.let(3)
        data = await stream.receive_some()
        server.stop.set()
        data += await read_to_end(stream)
        assert b'"code":"draining"' in data
        assert b"data: [DONE]\n\n" in data
        await server.stopped.wait()


async def test_a_reader_that_stalls_holds_nobody_up(bench: Bench, nursery: trio.Nursery) -> None:
    """A client that does not read delays neither the engine nor another client."""
    start(bench, nursery)  # never read
    bench.worker.let(1000)
    answer = await ask(bench.app, "POST", "/v1/completions", {"prompt": TOKENIZER.encode("x"), "max_tokens": 5})
    assert answer.json()["choices"][0]["text"] == continuation("x", 5)
    nursery.cancel_scope.cancel()
