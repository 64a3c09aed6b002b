"""Web pages: none by default, those of named origins in full, errors and streams included."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio.testing

from tests.server.helpers import Answer, ask, http, read_response, read_to_end, running
from tests.server.stub import open_stub
from trio_llm.config import AuthConfig, Config, LimitsConfig, ServerConfig
from trio_llm.engine import Engine
from trio_llm.errors import ConfigError
from trio_llm.server.app import ServerApp, create_app

KEY = "sk-0123456789abcdef"
PAGE = "https://chat.example"
STAINLESS = "authorization,content-type,x-stainless-lang,x-stainless-os,x-stainless-retry-count"
PREFLIGHT = (
    f"Origin: {PAGE}",
    "Access-Control-Request-Method: POST",
    f"Access-Control-Request-Headers: {STAINLESS}",
)


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    """Open an engine round a stub."""
    async with open_stub() as engine:
        yield engine


def app_for(engine: Engine, *origins: str, **settings: Any) -> ServerApp:
    """Return an app behind a key, one request a minute, that serves pages of these origins."""
    server = ServerConfig(allowed_origins=origins, **settings)
    auth = AuthConfig(api_keys=(KEY,), rate_limit_requests=2)
    return create_app(engine, Config(server=server, auth=auth, limits=LimitsConfig(max_body_bytes=1000)))


async def preflight(app: Any, *headers: str) -> tuple[int, dict[str, str], bytes]:
    """Ask over a socket what may be sent, as a browser does: without a key."""
    async with running(app) as server:
        stream = await server.connect()
        await stream.send_all(http("OPTIONS", "/v1/chat/completions", b"", *headers, "Connection: close"))
        return await read_response(stream)


async def test_a_preflight_is_answered_without_a_key(engine: Engine) -> None:
    """Origin, methods and the very headers that openai's client sends from a browser are allowed, not a 401."""
    status, headers, body = await preflight(app_for(engine, PAGE), *PREFLIGHT)
    assert (status, body) == (204, b"")
    assert headers["access-control-allow-origin"] == PAGE
    assert headers["access-control-allow-headers"] == STAINLESS
    assert "POST" in headers["access-control-allow-methods"]
    assert "access-control-allow-credentials" not in headers


@pytest.mark.parametrize("origins", [(), ("https://other.example",)])
async def test_other_pages_are_allowed_nothing(engine: Engine, origins: tuple[str, ...]) -> None:
    """CORS is off by default, and a page that is not named is not allowed anything."""
    _, headers, _ = await preflight(app_for(engine, *origins), *PREFLIGHT)
    assert "access-control-allow-origin" not in headers
    assert ("vary" in headers) == bool(origins)


async def test_methods_and_headers_can_be_listed(engine: Engine) -> None:
    """Listed, they are what the preflight allows, whatever was asked for; credentials are allowed where they are."""
    app = app_for(engine, PAGE, allowed_methods=("GET",), allowed_headers=("x-api-key",), allow_credentials=True)
    _, headers, _ = await preflight(app, *PREFLIGHT)
    assert headers["access-control-allow-methods"] == "GET"
    assert headers["access-control-allow-headers"] == "x-api-key"
    assert headers["access-control-allow-credentials"] == "true"


def check_marks(answer: Answer, origin: str = PAGE) -> None:
    """Check that a page may read an answer and its headers."""
    assert answer.headers["access-control-allow-origin"] == origin
    for name in ("x-request-id", "retry-after", "x-ratelimit-remaining-requests"):
        assert name in answer.headers["access-control-expose-headers"]


async def test_errors_can_be_read_too(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page learns of 401, 404, 413, 429, 431 and 500 by their own words, not as a failure of CORS."""
    app = app_for(engine, PAGE)
    page, keyed = {"Origin": PAGE}, {"Origin": PAGE, "x-api-key": KEY}
    cases: list[tuple[int, str, Any, dict[str, str]]] = [
        (401, "/v1/completions", {}, page),
        (431, "/v1/completions", {}, {**page, "x-long": "x" * 20_000}),
        (413, "/v1/completions", {"prompt": "x" * 2000}, keyed),
        (404, "/nowhere", {}, keyed),
        (429, "/v1/completions", {}, keyed),
    ]
    for status, path, body, headers in cases:
        answer = await ask(app, "POST", path, body, headers=headers)
        assert answer.status == status
        check_marks(answer)
        assert "Origin" in answer.headers["vary"]
    broken = app_for(engine, PAGE)
    monkeypatch.setattr(type(broken.services), "check_model", lambda self, name: 1 / 0)
    answer = await ask(broken, "POST", "/v1/completions", {"prompt": "x"}, headers=keyed)
    assert answer.status == 500
    check_marks(answer)


async def test_streams_can_be_read(engine: Engine) -> None:
    """A streamed answer bears the headers as well; one that no page asked for only says that they would differ."""
    app = app_for(engine, PAGE)
    body = {"prompt": "x", "max_tokens": 2, "stream": True}
    check_marks(await ask(app, "POST", "/v1/completions", body, headers={"Origin": PAGE, "x-api-key": KEY}))
    plain = await ask(app, "POST", "/v1/completions", body, headers={"x-api-key": KEY})
    assert "access-control-allow-origin" not in plain.headers
    assert plain.headers["vary"] == "Origin"


async def test_every_origin_can_be_allowed(engine: Engine) -> None:
    """With * any page may read, and none with its visitor's credentials."""
    app = app_for(engine, "*")
    answer = await ask(app, "GET", "/v1/models", headers={"Origin": "https://anybody.example", "x-api-key": KEY})
    check_marks(answer, "*")
    assert "access-control-allow-credentials" not in answer.headers


async def test_an_allowed_page_still_cannot_shut_down(engine: Engine) -> None:
    """/shutdown is for no web page, allowed origin or not."""
    app = create_app(engine, Config(server=ServerConfig(allowed_origins=("*",))), shutdown=lambda: None)
    assert (await ask(app, "GET", "/shutdown", headers={"Origin": PAGE})).status == 403


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"allowed_origins": ("*",), "allow_credentials": True}, "needs origins by name"),
        ({"allowed_origins": ("chat.example",)}, "must be \\* or like"),
        ({"allowed_origins": ("https://chat.example/",)}, "must be \\* or like"),
        ({"allowed_origins": ("https://a.example, https://b.example",)}, "must be \\* or like"),
    ],
)
async def test_settings_that_mean_nothing_are_refused_at_start(
    engine: Engine, settings: dict[str, Any], words: str
) -> None:
    """Any origin with credentials, and origins that no browser sends, are one line at start."""
    with pytest.raises(ConfigError, match=words):
        create_app(engine, Config(server=ServerConfig(**settings)))


async def test_a_preflight_leaves_the_connection_in_order(engine: Engine) -> None:
    """One with a body nobody wants is answered, and so is the request behind it on the same connection."""
    async with running(app_for(engine, PAGE)) as server:
        stream = await server.connect()
        head = http("OPTIONS", "/v1/models", b"", *PREFLIGHT, "Content-Length: 5")
        await stream.send_all(head)
        await trio.testing.wait_all_tasks_blocked()
        await stream.send_all(b"hello" + http("GET", "/health", b"", "Connection: close"))
        answers = await read_to_end(stream)
    assert answers.startswith(b"HTTP/1.1 204") and answers.count(b"HTTP/1.1 200") == 1


@pytest.mark.parametrize(
    ("headers", "expected"),
    [(("Content-Length: 5", "Transfer-Encoding: chunked"), 400), ((f"x-long: {'x' * 20_000}",), 431)],
)
async def test_a_preflight_is_refused_by_its_head_like_anything_else(
    engine: Engine, headers: tuple[str, ...], expected: int
) -> None:
    """Two lengths, the shape of request smuggling, and too much of a head are no matter of whose page it is."""
    status, told, _ = await preflight(app_for(engine, PAGE), *PREFLIGHT, *headers)
    assert status == expected and told["access-control-allow-origin"] == PAGE
