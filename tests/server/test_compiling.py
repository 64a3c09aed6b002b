"""Grammars that take too long to compile: their request is told so in time, and nobody else waits for them."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from typing import Any

import attrs
import pytest
import trio
import trio.testing

from tests.server.helpers import ask, running
from tests.server.stub import StubRunner, open_stub
from trio_llm import grammar
from trio_llm.config import Config, LimitsConfig
from trio_llm.grammar import GrammarCompiler, GrammarSource
from trio_llm.server.app import ServerApp, create_app
from trio_llm.server.constraints import response_format

HI: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}


@attrs.define
class Stuck:
    """Compilations of regular expressions that hold "stuck" do not end before the test does."""

    release: threading.Event = attrs.field(factory=threading.Event)
    num_begun: int = 0


@pytest.fixture
async def stuck(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Stuck]:
    """Let such compilations hang until the end of the test."""
    state, compile_source = Stuck(), GrammarCompiler.compile

    def hang(self: GrammarCompiler, source: GrammarSource) -> Any:
        if "stuck" in source.text:
            state.num_begun += 1
            state.release.wait()
        return compile_source(self, source)

    monkeypatch.setattr(GrammarCompiler, "compile", hang)
    yield state
    state.release.set()


async def post(app: ServerApp, pattern: str | None, **fields: Any) -> Any:
    """Ask for an answer of a form."""
    form = {} if pattern is None else {"structured_outputs": {"regex": pattern}}
    return await ask(app, "POST", "/v1/chat/completions", {**HI, **form, **fields})


@pytest.fixture
async def app(autojump_clock: trio.testing.MockClock) -> AsyncIterator[ServerApp]:
    """Return an app round a stub, in a time that jumps where everybody waits."""
    async with open_stub(StubRunner()) as engine:
        app = create_app(engine, Config(limits=LimitsConfig(grammar_timeout_s=3.0)))
        app.services.grammars.prepare()  # As before a server listens: this clock jumps while a thread does it.
        yield app


async def test_a_compilation_without_end_is_a_400_in_time(app: ServerApp, stuck: Stuck) -> None:
    """After the limit the client is told which field takes how long, and by which flag that is moved."""
    began = trio.current_time()
    answer = await post(app, "stuck")
    assert answer.status == 400
    assert answer.json()["error"]["param"] == "structured_outputs.regex"
    assert "longer than 3 s to compile (--grammar-timeout)" in answer.json()["error"]["message"]
    assert 3.0 <= trio.current_time() - began < 3.5


async def test_nobody_else_waits_for_it(app: ServerApp, stuck: Stuck) -> None:
    """With all compiling threads stuck, known grammars and free answers go on; new grammars are told to come again."""
    assert (await post(app, "[a-z]known")).status == 200
    async with trio.open_nursery() as nursery:
        for index in range(5):
            nursery.start_soon(post, app, f"stuck{index}")
    assert stuck.num_begun == 2
    began = trio.current_time()
    assert (await post(app, "[a-z]known")).status == 200
    assert (await post(app, None)).status == 200
    long = [{"role": "user", "content": "x" * 3000}]  # Tokenized in a thread.
    with trio.fail_after(60):
        assert (await post(app, None, messages=long)).status == 400
    assert trio.current_time() - began < 0.5
    late = await post(app, "[a-z]new")
    assert (late.status, late.headers["retry-after"]) == (503, "3")
    stuck.release.set()
    while (await post(app, "[a-z]new")).status == 503:
        await trio.testing.wait_all_tasks_blocked()
    assert (await post(app, "[a-z]new")).status == 200


NEVER_ENDS = {"allOf": [{"pattern": f"[a-c]*{letter}.{{{n}}}"} for letter in "abc" for n in range(5, 16, 2)]}
DEEP = "\n".join(f"{{0}}{n}: {{0}}{n + 1}" for n in range(4000))


async def test_a_compilation_that_never_ends_holds_no_thread() -> None:
    """What keeps the compiler busy for minutes is ended with its process, so the next new grammar is compiled."""
    async with open_stub(StubRunner()) as engine:
        app = create_app(engine, Config(limits=LimitsConfig(grammar_timeout_s=0.5)))
        app.services.grammars.prepare()
        for number in range(4):
            body = {**HI, "structured_outputs": {"json": {"title": str(number), **NEVER_ENDS}}}
            assert (await ask(app, "POST", "/v1/chat/completions", body)).status in {400, 503}
        # A 503 takes half a second; the processes have half a second of CPU time each.
        statuses = [(await post(app, "[a-z]new")).status for _ in range(40)]
        assert statuses[-1] == 200, statuses


async def test_what_is_too_large_is_refused_before_it_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large grammar costs no process five seconds before it is found to be too large."""
    rehearsed: list[GrammarSource] = []
    monkeypatch.setattr(response_format, "rehearse", lambda source, _: rehearsed.append(source))
    async with open_stub(StubRunner()) as engine:
        answer = await post(create_app(engine, Config()), "a" * 70_000)
    assert answer.status == 400 and "too large" in answer.json()["error"]["message"]
    assert rehearsed == []


@pytest.mark.parametrize("rule", ["a", "A"])
async def test_a_grammar_that_exhausts_the_stack_ends_no_server(rule: str) -> None:
    """Rules that refer to each other 4,000 deep ended the process; they are their client's error."""
    grammar = f"start: {rule}0\n" + DEEP.format(rule) + f'\n{rule}4000: "x"'
    async with open_stub(StubRunner()) as engine:
        app = create_app(engine, Config())
        answer = await ask(app, "POST", "/v1/chat/completions", {**HI, "structured_outputs": {"grammar": grammar}})
        assert answer.status == 400, answer.body
        assert answer.json()["error"]["message"].endswith(".grammar cannot be used: it is too complex to compile.")
        assert (await post(app, "[ab]{3}")).status == 200


async def test_the_vocabulary_is_indexed_before_anything_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """The index holds the interpreter for seconds: it is complete when the server listens, and made only once."""
    made: list[threading.Thread] = []
    index = grammar.unspellable

    def watched(text: str) -> str:
        made.append(threading.current_thread())
        return index(text)

    monkeypatch.setattr(grammar, "unspellable", watched)
    async with open_stub(StubRunner()) as engine:
        app = create_app(engine, Config())
        async with running(app):
            assert app.services.grammars.prepared
            assert (await post(app, "[ab]{3}")).status == 200
    assert len(made) == 1 and made[0] is not threading.current_thread()


async def test_a_vocabulary_that_cannot_be_indexed_stops_no_server(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A tokenizer that grammars cannot use is logged; requests without a grammar are answered."""

    def fail(self: GrammarCompiler) -> None:
        raise ValueError("no such tokenizer")

    monkeypatch.setattr(GrammarCompiler, "prepare", fail)
    async with open_stub(StubRunner()) as engine:
        app = create_app(engine, Config())
        async with running(app):
            assert (await post(app, None)).status == 200
    assert "The vocabulary cannot be indexed" in caplog.text
