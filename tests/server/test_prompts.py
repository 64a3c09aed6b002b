"""Where the work on a prompt is done: long texts never on the event loop, and not at all when they cannot fit."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio

from tests.server.helpers import ask
from tests.server.stub import StubRunner, open_stub, stub_tokenizer
from trio_llm.config import Config, LimitsConfig
from trio_llm.server.app import ServerApp, create_app


class Spy:
    """The stub's tokenizer, with a note of each text's length and whether the event loop's thread tokenized it."""

    def __init__(self) -> None:
        self.tokenizer = stub_tokenizer()
        self.seen: list[tuple[int, bool]] = []
        encode = self.tokenizer.encode
        loop = threading.current_thread()

        def spy(text: str, **options: Any) -> list[int]:
            self.seen.append((len(text), threading.current_thread() is loop))
            return encode(text, **options)

        self.tokenizer.encode = spy  # type: ignore[method-assign]


@pytest.fixture
async def spy() -> Spy:
    """Return one."""
    return Spy()


@pytest.fixture
async def app(spy: Spy) -> AsyncIterator[ServerApp]:
    """Return an app over a model with a long context."""
    async with open_stub(StubRunner(max_model_len=1000), spy.tokenizer) as engine:
        yield create_app(engine, Config())


async def test_short_texts_are_tokenized_at_once_and_long_ones_elsewhere(app: ServerApp, spy: Spy) -> None:
    """T3: a text of 3,000 characters is tokenized in a thread, as are many short ones together; a short one is not."""
    for prompt in ("x" * 10, "x" * 3000, ["x" * 30] * 100):
        body = {"prompt": prompt, "max_tokens": 1, "truncate_prompt_tokens": 5}
        assert (await ask(app, "POST", "/v1/completions", body)).status == 200
    assert spy.seen == [(10, True), (3000, False), *[(30, False)] * 100]


async def test_many_short_inputs_do_not_hold_the_loop(app: ServerApp, spy: Spy) -> None:
    """Texts to embed that are long together are tokenized in a thread, as one long one is; a short one is not."""
    for given in ("x" * 10, ["x" * 30] * 100):
        assert (await ask(app, "POST", "/v1/embeddings", {"input": given})).status == 200
    assert spy.seen == [(10, True), *[(30, False)] * 100]


async def test_many_tokens_are_spelled_elsewhere(app: ServerApp, spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    """/tokenize tells each token's string from a thread where there are many, and at once where there are few."""
    loop, here = threading.current_thread(), []
    spell = spy.tokenizer.token_string

    def note(token_id: int) -> str:
        here.append(threading.current_thread() is loop)
        return spell(token_id)

    monkeypatch.setattr(spy.tokenizer, "token_string", note)
    for length in (10, 3000):
        here.clear()
        body = {"prompt": "x" * length, "return_token_strs": True}
        assert (await ask(app, "POST", "/tokenize", body)).json()["count"] == len(here)
        assert set(here) == {length == 10}


async def test_words_count_as_text(app: ServerApp, spy: Spy) -> None:
    """Forbidden words are tokenized in a thread when they are long together."""
    body = {"prompt": "x", "max_tokens": 1, "bad_words": ["y" * 400] * 3}
    await ask(app, "POST", "/v1/completions", body)
    assert (400, False) in spy.seen


async def test_absurd_texts_are_not_tokenized(app: ServerApp, spy: Spy) -> None:
    """A text that cannot fit is refused by its length alone, in both endpoints."""
    text = "x" * 500_000
    for path, body in (
        ("/v1/completions", {"prompt": text}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}),
    ):
        answer = await ask(app, "POST", path, body)
        assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert spy.seen == []


async def test_a_conversation_is_rendered_in_a_thread(monkeypatch: pytest.MonkeyPatch, app: ServerApp) -> None:
    """A template is a program: it never runs on the event loop."""
    template: Any = app.services.template
    render, where = template.render, []

    def spying(*args: Any, **options: Any) -> Any:
        where.append(threading.current_thread())
        return render(*args, **options)

    monkeypatch.setattr(template, "render", spying)
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    assert (await ask(app, "POST", "/v1/chat/completions", body)).status == 200
    assert where
    assert threading.current_thread() not in where


async def test_a_template_that_never_ends_is_left() -> None:
    """A rendering that does not come back is a 400 after its time; the server goes on without it."""
    endless = "{% for _ in range(99999) %}" * 3 + "{% endfor %}" * 3
    async with open_stub(StubRunner(), stub_tokenizer(endless)) as engine:
        app = create_app(engine, Config(limits=LimitsConfig(template_timeout_s=0.01)))
        body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
        answer = await ask(app, "POST", "/v1/chat/completions", body)
    assert answer.status == 400
    assert "--template-timeout" in answer.json()["error"]["message"]


async def test_one_id_for_many_requests_mixes_nothing_up(app: ServerApp) -> None:
    """H-R02: a hundred requests at once under one x-request-id are a hundred requests."""
    answers: dict[int, str] = {}

    async def go(number: int) -> None:
        body = {"prompt": f"number {number}", "max_tokens": 4}
        answer = await ask(app, "POST", "/v1/completions", body, headers={"x-request-id": "same"})
        answers[number] = answer.json()["choices"][0]["text"]

    async with trio.open_nursery() as nursery:
        for number in range(100):
            nursery.start_soon(go, number)
    again = {number: answers[number] for number in range(0, 100, 10)}
    for number in again:
        await go(number)
    assert {number: answers[number] for number in again} == again
    assert len(set(answers.values())) > 50
