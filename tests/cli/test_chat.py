"""`trio-llm chat` as its user meets it, with the server's own code behind it and a model without torch."""

from __future__ import annotations

import functools
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import attrs
import click
import pytest
import trio
from click.testing import CliRunner

from tests.server.stub import StubRunner, continuation, open_stub
from trio_llm.cli import chat, own_server
from trio_llm.cli.client import Api, ApiError
from trio_llm.cli.commands import cli
from trio_llm.config import Config
from trio_llm.engine import Engine


@attrs.define
class Seen:
    """The engines that a command opened, and what they were asked."""

    engines: list[Engine] = attrs.field(factory=list)
    runner: StubRunner = attrs.field(factory=StubRunner)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Give `chat` a model without torch."""
    seen = Seen()

    @asynccontextmanager
    async def open_engine(config: Config, **_: Any) -> AsyncIterator[Engine]:
        assert config.auth.rate_limit_requests == 0
        async with open_stub(seen.runner) as engine:
            seen.engines.append(engine)
            yield engine

    monkeypatch.setattr(own_server, "open_engine", open_engine)
    return seen


def prompt(*turns: str) -> str:
    """Write the stub template's prompt: the turns from the user's first on, and the opening of an answer."""
    roles = ["user", "assistant"] * len(turns)
    body = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in zip(roles, turns, strict=False))
    return body + "<|im_start|>assistant\n"


def answer(*turns: str, tokens: int = 5) -> str:
    """Return what the stub says to a conversation."""
    return continuation(prompt(*turns), tokens)


def talk(*lines: str, flags: tuple[str, ...] = ()) -> str:
    """Run the command with these lines as its input."""
    result = CliRunner().invoke(cli, ["chat", "--max-tokens", "5", *flags], input="\n".join(lines))
    assert result.exit_code == 0, result.output
    return result.output


def test_answers_are_shown_and_the_conversation_goes_on(seen: Seen) -> None:
    """Each answer is the model's to all turns before it, with its tokens and its speed."""
    first = answer("hello")
    second = answer("hello", first, "more")
    output = talk("hello", "", "more", "/exit", "never asked")
    assert output.count("[5 tokens, ") == 2 and "tokens/s, first after" in output
    assert output.splitlines()[0] == first
    assert second in output
    assert "never" not in output


def test_reset_forgets_and_an_unknown_command_is_not_asked(seen: Seen) -> None:
    """/reset begins a new conversation; a misspelt command is told, not sent to the model."""
    output = talk("hello", "/reset", "/rest", "more")
    assert answer("more") in output
    assert "There is no /rest. /reset forgets" in output
    assert output.count("tokens/s") == 2


def test_an_interrupt_stops_the_answer_and_keeps_what_was_said(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends the answer on the server too; the words shown so far are part of the conversation."""
    shown: list[str] = []
    bodies: list[Any] = []
    open_ = Api.open

    def echo(text: str = "", **settings: Any) -> None:
        shown.append(text)
        if len(shown) == 2:
            raise KeyboardInterrupt

    def watch(self: Api, method: str, path: str, body: Any = None, **settings: Any) -> Any:
        bodies.append(json.loads(json.dumps(body)))
        return open_(self, method, path, body, **settings)

    monkeypatch.setattr(chat.click, "echo", echo)
    monkeypatch.setattr(Api, "open", watch)
    CliRunner().invoke(cli, ["chat", "--max-tokens", "400"], input="hello\nmore\n/exit\n")
    said = bodies[2]["messages"]
    assert [message["role"] for message in said] == ["user", "assistant", "user"]
    assert said[1]["content"] == "".join(map(click.unstyle, shown[:2]))
    assert any(line.startswith("[stopped, ") for line in map(str.strip, map(click.unstyle, shown)))
    metrics = seen.engines[0].registry
    aborted = metrics.get_sample_value(
        "vllm:request_success_total", {"model_name": "models/stub", "engine": "0", "finished_reason": "abort"}
    )
    assert aborted == 1


def test_a_refused_question_is_told_and_forgotten(seen: Seen) -> None:
    """A question that the server refuses shows its reason, and the next one is asked without it."""
    output = talk("x" * 2000, "hello")
    assert "maximum context length" in output
    assert answer("hello") in output


def test_settings_of_a_model_of_ones_own_are_refused_for_a_server() -> None:
    """A flag that a running server cannot obey is an error that names it."""
    result = CliRunner().invoke(cli, ["chat", "--base-url", "http://localhost:1/v1", "--kv-blocks", "7"])
    assert result.exit_code == 2
    assert "flag --kv-blocks is for a model loaded here" in result.output


def one_answer(reply: bytes) -> Callable[[trio.SocketStream], Any]:
    """Make a server that answers anything so, and hangs up."""

    async def handle(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.send_all(reply)
        await stream.aclose()

    return handle


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        (b"HTTP/1.1 404 x\r\n\r\nno such page", "404: no such page"),
        (b'HTTP/1.1 401 x\r\n\r\n{"error":"Unauthorized"}', "401: Unauthorized"),
        (b"SSH-2.0-x\r\n\r\n", "as an HTTP server does"),
        (b"HTTP/1.1 200 x\r\n\r\ndata: {}\n\n", "the stream broke off"),
        (b'HTTP/1.1 200 x\r\n\r\ndata: {"error":{"message":"ouch"}}\n\n', "ouch"),
    ],
)
async def test_what_a_server_does_wrong_is_one_clear_error(reply: bytes, told: str) -> None:
    """Whatever a server answers, the client says what it was in one error of its own kind."""
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(functools.partial(trio.serve_tcp, one_answer(reply), 0, host="127.0.0.1"))
        api = Api(f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}")

        async def read() -> None:
            async with api.open("POST", "/chat/completions", {}) as answered:
                while await answered.next_event() is not None:
                    pass

        with pytest.raises(ApiError, match=told):
            await read()
        nursery.cancel_scope.cancel()


async def test_a_wrong_url_and_a_closed_port_are_errors() -> None:
    """A base URL that is none, and one where nobody listens, are told in words."""
    with pytest.raises(ApiError, match="is no base URL"):
        await Api("localhost:8000").models()
    with pytest.raises(ApiError, match=r"cannot connect to 127\.0\.0\.1:9"):
        await Api("http://127.0.0.1:9/v1").models()
