"""Every limit is one that something reads: moved, it refuses what it let pass, and says its number and its flag."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import attrs
import pytest
import trio
import trio.testing
from trio.testing import wait_all_tasks_blocked

from tests.server.helpers import ask, exchange, http, read_response, read_to_end, running
from tests.server.stub import GatedWorker, StubRunner, open_stub, stub_tokenizer
from trio_llm.config import Config, LimitsConfig, ServerConfig
from trio_llm.grammar import Grammar, GrammarCompiler, GrammarSource
from trio_llm.server.app import create_app
from trio_llm.server.bodies.size_limits import flag_of
from trio_llm.server.http import serve as serve_module

COMPLETION = {"prompt": "x", "max_tokens": 1}
TURN = {"role": "user", "content": "x"}
# A rendering that takes some milliseconds, and whose text is some thousand characters.
# It outlasts a few ticks of the clock that counts CPU time, on a fast processor too.
SLOW_TEMPLATE = "{% for n in range(20000) %}{{ n % 7 }}{% for _ in range(30) %}{% endfor %}{% endfor %}"


@attrs.frozen
class Row:
    """A request that a limit of `low` refuses and one of `high` lets pass."""

    low: Any
    high: Any
    body: dict[str, Any]
    path: str = "/v1/completions"
    headers: dict[str, str] = attrs.field(factory=dict)


def completion(**fields: Any) -> dict[str, Any]:
    """Return a body."""
    return {**COMPLETION, **fields}


CHAT = {"messages": [TURN] * 3, "max_tokens": 1}
REQUESTS: dict[str, Row] = {
    "strict": Row(True, False, completion(foo=1)),
    "max_body_bytes": Row(100, 1000, completion(prompt="x" * 200)),
    "max_json_depth": Row(2, 3, completion(foo=[[]])),
    "max_json_nodes": Row(3, 4, completion(foo=[[], []])),
    "max_json_keys": Row(3, 4, completion(foo={"a:": 1})),
    "max_json_digits": Row(5, 6, completion(foo=123456)),
    "max_messages": Row(2, 3, CHAT, "/v1/chat/completions"),
    "max_prompts": Row(2, 3, completion(prompt=["a", "b", "c"])),
    "max_inputs": Row(2, 3, {"input": ["a", "b", "c"]}, "/v1/embeddings"),
    "max_n": Row(2, 3, completion(n=3)),
    "max_samples": Row(5, 6, completion(n=3, prompt=["a", "b"])),
    "max_stop_strings": Row(2, 3, completion(stop=["x", "y", "z"])),
    "max_stop_bytes": Row(2, 3, completion(stop="xyz")),
    "max_stop_token_ids": Row(2, 3, completion(stop_token_ids=[1, 2, 3])),
    "max_logit_bias": Row(2, 3, completion(logit_bias={"1": 1, "2": 1, "3": 1})),
    "max_metadata_pairs": Row(2, 3, completion(metadata={"a": "", "b": "", "c": ""})),
    "max_metadata_key_chars": Row(2, 3, completion(metadata={"abc": ""})),
    "max_metadata_value_chars": Row(2, 3, completion(metadata={"a": "abc"})),
    "max_header_bytes": Row(300, 3000, COMPLETION, headers={"x-long": "x" * 300}),
    "max_headers": Row(9, 10, COMPLETION, headers={f"x-{number}": "" for number in range(8)}),
    "max_template_chars": Row(100, 100_000, CHAT, "/v1/chat/completions"),
    "template_timeout_s": Row(0.001, 60.0, CHAT, "/v1/chat/completions"),
    "grammar_timeout_s": Row(1.0, 60.0, completion(structured_outputs={"regex": "[ab]"})),
}


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Return what compilations wait for. A slow grammar instead might end before, or be begun after, a low limit."""
    gate, compile_source = threading.Event(), GrammarCompiler.compile

    def wait(self: GrammarCompiler, source: GrammarSource) -> Grammar:
        gate.wait()
        return compile_source(self, source)

    monkeypatch.setattr(GrammarCompiler, "compile", wait)
    gate.set()
    yield gate
    gate.set()


@pytest.mark.parametrize("name", REQUESTS)
async def test_a_request_is_held_to_a_limit_that_moves(name: str, gate: threading.Event) -> None:
    """The same request is refused with number and flag under a low limit, and not for it under a higher one."""
    row = REQUESTS[name]
    tokenizer = stub_tokenizer(SLOW_TEMPLATE if "template" in name else "x")
    async with open_stub(StubRunner(), tokenizer) as engine:
        for value in (row.high, row.low):
            app = create_app(engine, Config(limits=LimitsConfig(**{name: value})))
            if name == "grammar_timeout_s" and value == row.low:
                gate.clear()
            answer = await ask(app, "POST", row.path, row.body, headers=row.headers)
            told = answer.body.decode()
            if value == row.low:
                assert answer.status in (400, 413, 431)
                assert flag_of(name) in told
                assert name == "strict" or f"{row.low:g}" in told
            else:
                assert flag_of(name) not in told
                assert answer.status == (400 if "template" in name else 200), told  # Its text is no good prompt.


async def seconds_until(clock: trio.testing.MockClock, ended: Callable[[], Awaitable[object]]) -> int:
    """Let time pass second by second until something ends; return how many it took."""
    seconds = 0
    done = trio.Event()

    async def wait() -> None:
        await ended()
        done.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await wait_all_tasks_blocked(0.01)
        while not done.is_set():
            assert seconds < 100
            clock.jump(1)
            seconds += 1
            await wait_all_tasks_blocked(0.01)
    return seconds


async def answer_for_ever(send: Any) -> None:
    """Answer for ever."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    while True:
        await send({"type": "http.response.body", "body": b"x" * 10_000, "more_body": True})
        await trio.lowlevel.checkpoint()


async def headers_of(clock: trio.testing.MockClock, limits: LimitsConfig, request: bytes) -> int:
    """Return how long the server waits for the rest of a request."""
    async with open_stub() as engine, running(create_app(engine, Config(limits=limits)), limits=limits) as server:
        stream = await server.connect()
        await stream.send_all(request)
        return await seconds_until(clock, lambda: read_to_end(stream))


async def next_request(clock: trio.testing.MockClock, limits: LimitsConfig) -> int:
    """Return how long the server waits for a second request."""
    async with open_stub() as engine, running(create_app(engine, Config(limits=limits)), limits=limits) as server:
        stream = await server.connect()
        await stream.send_all(http("GET", "/version"))
        await read_response(stream)
        return await seconds_until(clock, lambda: read_to_end(stream))


async def stalled_reader(clock: trio.testing.MockClock, limits: LimitsConfig) -> int:
    """Return how long the server waits for a client that does not read."""
    ended = trio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer_for_ever, send)
            while (await receive())["type"] != "http.disconnect":
                pass
            ended.set()
            nursery.cancel_scope.cancel()

    async with running(app, limits=limits) as server:
        stream = await server.connect(receive_buffer_bytes=4096)
        await stream.send_all(http("GET", "/"))
        return await seconds_until(clock, ended.wait)


async def slow_answer(clock: trio.testing.MockClock, limits: LimitsConfig) -> int:
    """Return how long a request may take."""
    async with open_stub(worker=GatedWorker()) as engine:
        call = exchange(create_app(engine, Config(limits=limits)), "POST", "/v1/completions", b'{"prompt": "x"}')
        async with trio.open_nursery() as nursery:
            nursery.start_soon(call.run)
            return await seconds_until(clock, call.body)


TIMES: dict[str, Callable[[trio.testing.MockClock, LimitsConfig], Awaitable[int]]] = {
    "header_timeout_s": lambda clock, limits: headers_of(clock, limits, b"GET /version HTTP/1.1\r\nHost:"),
    "body_timeout_s": lambda clock, limits: headers_of(
        clock, limits, http("POST", "/v1/completions", b"{}", "Content-Type: application/json")[:-1]
    ),
    "keep_alive_timeout_s": next_request,
    "write_timeout_s": stalled_reader,
    "request_timeout_s": slow_answer,
}


@pytest.mark.parametrize("name", TIMES)
async def test_patience_ends_when_its_limit_says(name: str, mock_clock: trio.testing.MockClock) -> None:
    """Each timeout ends what it is about after so many seconds, and after two more where it is set to two more."""
    first, second = [
        await TIMES[name](mock_clock, LimitsConfig(**{"keep_alive_timeout_s": 99.0, name: seconds}))
        for seconds in (3.0, 5.0)
    ]
    assert second - first == 2
    # The edge waits a moment longer for the rest of a body before it answers, and the client for the connection's end.
    assert first == 3 or name == "body_timeout_s"


async def answer_to_upload(limits: LimitsConfig, directory: str) -> bytes:
    """Upload 2,000 bytes."""
    form = b'--B\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n' + b"x" * 2000
    purpose = b'\r\n--B\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nuser_data\r\n--B--\r\n'
    config = Config(limits=limits, server=ServerConfig(data_dir=directory))
    async with open_stub() as engine, running(create_app(engine, config)) as server:
        stream = await server.connect()
        await stream.send_all(
            http("POST", "/v1/files", form + purpose, "Content-Type: multipart/form-data; boundary=B")
        )
        return (await read_response(stream))[2]


async def test_an_upload_is_held_to_its_limit(tmp_path: Any) -> None:
    """A file larger than max_file_bytes is refused, and the same file passes under a higher limit."""
    refused = await answer_to_upload(LimitsConfig(max_file_bytes=1999), str(tmp_path / "low"))
    assert b"at most 1999 bytes (--max-file-bytes)" in refused
    assert b'"bytes":2000' in await answer_to_upload(LimitsConfig(max_file_bytes=2000), str(tmp_path / "high"))


@pytest.mark.parametrize("name", ["max_stored_bytes", "max_stored_bytes_per_key"])
async def test_stored_bytes_are_held_to_a_limit_that_moves(tmp_path: Any, name: str) -> None:
    """Uploads count together with what is stored already; one that would exceed the limit is told its flag."""
    for most, fits in ((4000, True), (5999, False), (6000, True)):
        answer = await answer_to_upload(LimitsConfig(**{name: most}), str(tmp_path))
        refusal = f"at most {most} bytes ({flag_of(name)})".encode()
        assert (b'"bytes":2000' in answer, refusal in answer) == (fits, not fits)
        if most == 4000:
            assert b'"bytes":2000' in await answer_to_upload(LimitsConfig(**{name: most}), str(tmp_path))


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/completions", {"prompt": "xyz", "n": 2}), ("/v1/embeddings", {"input": ["xyz"] * 2})]
)
async def test_prompts_in_the_engine_are_held_to_a_limit_that_moves(path: str, body: dict[str, Any]) -> None:
    """Prompt tokens of all requests together are bounded, a lone request never refused, and all are given back."""
    for most, statuses in ((11, [200, 503]), (12, [200, 200])):
        worker = GatedWorker()
        async with open_stub(worker=worker) as engine:
            app = create_app(engine, Config(limits=LimitsConfig(max_queued_tokens=most)))
            answers: list[Any] = []

            async def go(app: Any = app, answers: list[Any] = answers) -> None:
                answers.append(await ask(app, "POST", path, body))

            async with trio.open_nursery() as nursery:
                for _ in statuses:
                    nursery.start_soon(go)
                await wait_all_tasks_blocked()
                worker.open = True
                worker.let(10)
            assert sorted(answer.status for answer in answers) == statuses
            for answer in answers:
                if answer.status == 503:
                    assert f"6 prompt tokens wait and run: at most {most} (--max-queued-tokens)" in answer.body.decode()
                    assert answer.headers["retry-after"]
            await go()
            assert answers[-1].status == 200


@pytest.mark.parametrize("name", ["max_connections", "max_connections_per_peer"])
async def test_connections_are_held_to_a_limit_that_moves(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many connections are served, and the next one is told how many and by which flag."""
    monkeypatch.setattr(serve_module, "is_loopback", lambda address: False)
    for most in (1, 3):
        async with open_stub() as engine:
            async with running(create_app(engine, Config()), limits=LimitsConfig(**{name: most})) as server:
                told: list[bytes] = []
                for _ in range(most + 1):
                    stream = await server.connect()
                    await stream.send_all(http("GET", "/version"))
                    told.append((await read_response(stream))[2])
        assert [b"version" in body for body in told] == [True] * most + [False]
        assert f"at most {most} ({flag_of(name)})".encode() in told[-1]


def test_the_tables_cover_every_limit() -> None:
    """A limit that is added without a test that moves it is noticed."""
    covered = {*REQUESTS, *TIMES, "max_file_bytes", "max_queued_tokens", "max_connections", "max_connections_per_peer"}
    covered |= {"max_caller_share"}  # See test_shares.py.
    covered |= {"max_stored_bytes", "max_stored_bytes_per_key"}
    assert covered == {field.name for field in attrs.fields(LimitsConfig)}
