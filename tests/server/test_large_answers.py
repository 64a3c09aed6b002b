"""Answers of megabytes are built and written in a worker thread: the event loop turns meanwhile."""

from __future__ import annotations

import json
import threading
from typing import Any

import msgspec
import pytest

from tests.server.helpers import ask
from tests.server.stub import StubRunner, open_stub
from trio_llm.config import Config
from trio_llm.server.app import create_app
from trio_llm.server.batches.service import execute_line
from trio_llm.server.openai import logprobs

CHAT = {"messages": [{"role": "user", "content": "x" * 300}], "max_tokens": 64, "temperature": 0}
TEXT = {"prompt": "x" * 300, "max_tokens": 64, "temperature": 0}
LARGE = [
    ("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 20}),
    ("/v1/chat/completions", {**CHAT, "logprobs": True, "prompt_logprobs": 10}),
    ("/v1/completions", {**TEXT, "logprobs": 20}),
    ("/v1/completions", {**TEXT, "echo": True, "max_tokens": 1, "logprobs": 10}),
    ("/v1/completions", {**TEXT, "n": 20, "logprobs": 1}),
]
SMALL = [
    ("/v1/chat/completions", {**CHAT, "max_tokens": 8, "logprobs": True, "top_logprobs": 2}),
    ("/v1/completions", {**TEXT, "max_tokens": 8, "logprobs": 2}),
]


class Threads:
    """Records in which threads log-probabilities are collected and answers are encoded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: set[bool] = set()
        self._here = threading.current_thread()
        for where, name in ((logprobs, "_finite"), (msgspec.json, "encode"), (msgspec, "to_builtins")):
            self._watch(monkeypatch, where, name)

    def _watch(self, monkeypatch: pytest.MonkeyPatch, where: Any, name: str) -> None:
        original = getattr(where, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            self.seen.add(threading.current_thread() is self._here)
            return original(*args, **kwargs)

        monkeypatch.setattr(where, name, watched)


@pytest.mark.parametrize(("path", "body"), LARGE)
async def test_large_answers_leave_the_event_loop(path: str, body: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of log-probabilities are collected and encoded in a thread, for a request and a line of a batch."""
    async with open_stub(StubRunner()) as engine:
        app = create_app(engine, Config())
        threads = Threads(monkeypatch)
        answer = await ask(app, "POST", path, body)
        assert answer.status == 200 and threads.seen == {False}
        line = await execute_line(app.services, path, json.dumps({"body": body}).encode(), "")
        assert threads.seen == {False}
    assert json.loads(json.dumps(line))["choices"] == answer.json()["choices"]


async def test_the_echo_of_a_stream_leaves_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """A streamed echo's log-probabilities are collected and written in a thread; a short one's are not."""
    echo = {**TEXT, "echo": True, "max_tokens": 1, "stream": True}
    async with open_stub(StubRunner()) as engine:
        app = create_app(engine, Config())
        threads = Threads(monkeypatch)
        answer = await ask(app, "POST", "/v1/completions", {**echo, "logprobs": 10})
        assert len(answer.events()[0]["choices"][0]["logprobs"]["tokens"]) == 301
        assert threads.seen == {False}
        threads.seen.clear()
        await ask(app, "POST", "/v1/completions", {**echo, "prompt": "x" * 30, "logprobs": 1})
        assert threads.seen == {True}


@pytest.mark.parametrize(("path", "body"), SMALL)
async def test_small_answers_stay(path: str, body: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small answer does not pay for a thread."""
    async with open_stub(StubRunner()) as engine:
        app = create_app(engine, Config())
        threads = Threads(monkeypatch)
        assert (await ask(app, "POST", path, body)).status == 200
    assert threads.seen == {True}
