"""`trio-llm chat`: a conversation in the terminal, with a running server or with an engine of its own."""

from __future__ import annotations

import sys
import time
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing
from functools import partial
from typing import Any

import attrs
import click

from trio_llm.bridge import Bridge
from trio_llm.cli.announce import LoadingDisplay
from trio_llm.cli.client import Api, ApiError
from trio_llm.cli.settings import Settings

_HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer."


@attrs.frozen
class _Piece:
    """Text of an answer. `said` is False for reasoning, which is printed but not sent back to the model."""

    text: str = ""
    said: bool = True
    num_tokens: int | None = None


def run(
    settings: Settings, api: Api | None, model: str | None, system: str | None, parameters: Mapping[str, Any]
) -> None:
    """Talk until the user leaves.

    Args:
        settings: For an engine of its own.
        api: A server to talk to instead.
        model: Its model to ask for; default: the first that it lists.
        system: Begins every conversation.
        parameters: Of each request; those that are None are left out.
    """
    with LoadingDisplay() as display:
        bridge = Bridge(_opening(settings, api, display))
    with bridge:
        body: dict[str, Any] = {name: value for name, value in parameters.items() if value is not None}
        models = bridge.call(bridge.value.models)
        body["model"] = model or models[0]
        if sys.stdin.isatty():
            click.echo(f"{body['model']}. {_HELP}")
        _Conversation(bridge, body, system).talk()


def _opening(
    settings: Settings, api: Api | None, display: LoadingDisplay
) -> Callable[[], AbstractAsyncContextManager[Api]]:
    if api is None:
        from trio_llm.cli.own_server import own_server

        return partial(own_server, settings.config, display.report)

    @asynccontextmanager
    async def there_already() -> AsyncGenerator[Api, None]:
        yield api

    return there_already


class _Conversation:
    """The messages so far, and the loop that adds to them."""

    def __init__(self, bridge: Bridge[Api], body: Mapping[str, Any], system: str | None) -> None:
        self._bridge = bridge
        self._body = body
        self._opening: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
        self._messages = list(self._opening)

    def talk(self) -> None:
        """Read lines and answer them until /exit or the end of input."""
        for line in _lines():
            match line.strip():
                case "":
                    continue
                case "/exit" | "/quit" | "/bye":
                    return
                case "/reset":
                    self._messages = list(self._opening)
                    click.echo("(forgotten)")
                case command if command.startswith("/") and " " not in command:
                    click.echo(f"There is no {command}. {_HELP}")
                case words:
                    self._answer(words)

    def _answer(self, words: str) -> None:
        """Print an answer as it arrives; the text before Ctrl-C becomes part of the conversation."""
        self._messages.append({"role": "user", "content": words})
        said: list[str] = []
        started_s, first_s, num_pieces, num_tokens = time.perf_counter(), 0.0, 0, None
        note = ""
        try:
            with closing(self._pieces()) as pieces:
                for piece in pieces:
                    num_tokens = piece.num_tokens or num_tokens
                    if piece.said:
                        said.append(piece.text)
                    if piece.text:
                        num_pieces += 1
                        first_s = first_s or time.perf_counter()
                        click.echo(click.style(piece.text, dim=not piece.said), nl=False)
        except KeyboardInterrupt:
            note = "stopped, "
        except ApiError as error:
            click.echo(f"\nerror: {error}", err=True)
        if not num_pieces:
            self._messages.pop()
            return
        self._messages.append({"role": "assistant", "content": "".join(said)})
        count = num_tokens or num_pieces
        rate = (count - 1) / max(time.perf_counter() - first_s, 1e-6)
        timing = f"{count} tokens, {rate:.0f} tokens/s, first after {1e3 * (first_s - started_s):.0f} ms"
        click.echo("\n" + click.style(f"[{note}{timing}]", dim=True))

    def _pieces(self) -> Generator[_Piece, None, None]:
        async def ask(put: Callable[[_Piece], None]) -> None:
            body = {**self._body, "messages": self._messages, "stream": True, "stream_options": {"include_usage": True}}
            async with self._bridge.value.open("POST", "/chat/completions", body) as reply:
                while (event := await reply.next_event()) is not None:
                    for piece in _pieces_of(event):
                        put(piece)

        return self._bridge.iterate(ask)


def _pieces_of(event: Mapping[str, Any]) -> Iterator[_Piece]:
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        if thought := delta.get("reasoning_content") or delta.get("reasoning"):
            yield _Piece(thought, said=False)
        if text := delta.get("content"):
            yield _Piece(text)
    if usage := event.get("usage"):
        yield _Piece(num_tokens=usage.get("completion_tokens"))


def _lines() -> Iterator[str]:
    """Yield what the user types; Ctrl-C at the prompt drops the line, as in a shell."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    import readline  # noqa: F401 - gives input() a history and editing

    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            click.echo()
        except EOFError:
            click.echo()
            return
