"""Whose word counts for where a request comes from: a named proxy's, about the last hop that is no proxy itself."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.server.helpers import Answer, ask, http, read_response, running
from tests.server.stub import open_stub
from trio_llm.config import AuthConfig, Config, LimitsConfig, ServerConfig
from trio_llm.engine import Engine
from trio_llm.errors import ConfigError
from trio_llm.server.app import create_app
from trio_llm.server.http import serve as serve_module
from trio_llm.server.http.proxies import TrustedProxies

PROXY = ("10.0.0.1", 1234)
STRANGER = ("192.0.2.7", 1234)
OURS = ("127.0.0.1", "10.0.0.0/8", "2001:db8:ffff::/48")


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    """Open an engine round a stub."""
    async with open_stub() as engine:
        yield engine


def seen(client: tuple[str, int] | None, *headers: tuple[str, str]) -> str:
    """Return the client that a request is taken to come from."""
    scope = {"client": client, "headers": [(name.encode(), value.encode("latin-1")) for name, value in headers]}
    TrustedProxies.parse(OURS).see_through(scope)
    return scope["client"][0]  # type: ignore[index]


FOR, STANDARD = "X-Forwarded-For", "Forwarded"
SEEN: list[tuple[tuple[str, int], list[tuple[str, str]], str]] = [
    (STRANGER, [(FOR, "6.6.6.6")], "192.0.2.7"),  # nobody's word
    (PROXY, [], "10.0.0.1"),
    (PROXY, [(FOR, "198.51.100.1")], "198.51.100.1"),
    (PROXY, [(FOR, "6.6.6.6, 198.51.100.1")], "198.51.100.1"),  # the client wrote the left one itself
    (PROXY, [(FOR, "rubbish, 198.51.100.1, 10.0.0.2")], "198.51.100.1"),
    (PROXY, [(FOR, "6.6.6.6"), (FOR, "198.51.100.1")], "198.51.100.1"),
    (PROXY, [(FOR, "10.0.0.3, 10.0.0.2")], "10.0.0.3"),
    (PROXY, [(FOR, "198.51.100.1:55555")], "198.51.100.1"),
    (PROXY, [(FOR, "2001:db8::7")], "2001:db8::7"),
    (PROXY, [(FOR, "[2001:db8::7]:443, 2001:db8:ffff::1")], "2001:db8::7"),
    (PROXY, [(FOR, "::ffff:198.51.100.1")], "198.51.100.1"),
    (("::ffff:10.0.0.1", 1), [(FOR, "198.51.100.1")], "198.51.100.1"),
    (PROXY, [(STANDARD, "for=198.51.100.1;proto=https")], "198.51.100.1"),
    (PROXY, [(STANDARD, 'for=6.6.6.6, For="[2001:db8::7]:4711";by=10.0.0.1')], "2001:db8::7"),
    (PROXY, [(STANDARD, 'proto=https;for=198.51.100.1;host="a, for=6.6.6.6"')], "198.51.100.1"),
    (PROXY, [(STANDARD, "for=198.51.100.1"), (FOR, "198.51.100.1")], "198.51.100.1"),
]


@pytest.mark.parametrize(("client", "headers", "expected"), SEEN)
def test_the_client_is_the_last_hop_that_is_not_ours(
    client: tuple[str, int], headers: list[tuple[str, str]], expected: str
) -> None:
    """Headers count from a trusted socket peer alone, and of them the right-most address that is no proxy of ours."""
    assert seen(client, *headers) == expected


BAD: list[list[tuple[str, str]]] = [
    [(FOR, "")],
    [(FOR, "unknown")],
    [(FOR, "198.51.100.1, localhost")],
    [(FOR, "198.51.100.1, 10.0.0.2, ")],
    [(STANDARD, "")],
    [(STANDARD, "for=_hidden")],
    [(STANDARD, "by=10.0.0.1")],
    [(STANDARD, 'for=6.6.6.6;host="a, for=198.51.100.1')],  # its open quote would swallow what the proxy wrote
    [(STANDARD, "for=6.6.6.6"), (FOR, "198.51.100.1")],
]


@pytest.mark.parametrize("headers", BAD)
async def test_a_proxy_that_names_nobody_is_refused(engine: Engine, headers: list[tuple[str, str]]) -> None:
    """A trusted proxy's header without an address, or two that disagree, are a 400: its own address might be local."""
    app = create_app(engine, Config(server=ServerConfig(trusted_proxies=OURS)))
    assert (await ask(app, "GET", "/health", headers=dict(headers), client=PROXY)).status == 400
    assert (await ask(app, "GET", "/health", headers=dict(headers), client=STRANGER)).status == 200


async def test_clients_behind_a_proxy_have_limits_of_their_own(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """The rate is counted by the client that the proxy names, IPv6 by its /64, and the log names it too."""
    caplog.set_level("INFO", "trio_llm.server.app")
    auth = AuthConfig(rate_limit_requests=1, rate_limit_window_secs=3600)
    app = create_app(engine, Config(server=ServerConfig(trusted_proxies=OURS), auth=auth))

    async def status(client: str) -> int:
        return (await ask(app, "GET", "/v1/models", headers={FOR: client}, client=("127.0.0.1", 1))).status

    clients = ["198.51.100.1", "198.51.100.1", "198.51.100.2", "2001:db8::1", "2001:db8::2", "2001:db8:0:1::1"]
    assert [await status(client) for client in clients] == [200, 429, 200, 200, 429, 200]
    assert "from 198.51.100.2 200" in caplog.text


async def shutdown(engine: Engine, client: str, headers: dict[str, str], proxies: tuple[str, ...]) -> Answer:
    """Ask for the end."""
    app = create_app(engine, Config(server=ServerConfig(trusted_proxies=proxies)), shutdown=lambda: None)
    return await ask(app, "GET", "/shutdown", headers=headers, client=(client, 1))


@pytest.mark.parametrize(
    ("client", "headers", "proxies", "status"),
    [
        ("127.0.0.1", {FOR: "127.0.0.1"}, (), 403),
        ("127.0.0.1", {FOR: "198.51.100.1"}, OURS, 403),
        ("127.0.0.1", {FOR: "127.0.0.1, 198.51.100.1"}, OURS, 403),
        ("192.0.2.7", {FOR: "127.0.0.1"}, OURS, 403),
        ("127.0.0.1", {"Via": "1.1 somebody"}, OURS, 403),
        ("127.0.0.1", {FOR: "127.0.0.1"}, OURS, 403),
        ("127.0.0.1", {}, OURS, 202),
    ],
)
async def test_shutdown_sees_through_trusted_proxies_alone(
    engine: Engine, client: str, headers: dict[str, str], proxies: tuple[str, ...], status: int
) -> None:
    """Behind a trusted proxy the client it names must be local; any other forwarding is refused, whatever it says."""
    assert (await shutdown(engine, client, headers, proxies)).status == status


async def test_metrics_are_not_local_to_those_behind_a_proxy(engine: Engine) -> None:
    """With keys, /metrics is open to this machine and closed to whom a proxy on this machine speaks for."""
    config = Config(server=ServerConfig(trusted_proxies=OURS), auth=AuthConfig(api_keys=("sk-0123456789abcdef",)))
    app = create_app(engine, config)
    for headers, status in (({}, 200), ({FOR: "198.51.100.1"}, 401)):
        assert (await ask(app, "GET", "/metrics", headers=headers, client=("127.0.0.1", 1))).status == status


@pytest.mark.parametrize("text", ["proxy.example", "10.0.0.1/8", "10.0.0.0/99", ""])
async def test_what_is_no_network_is_refused_at_start(engine: Engine, text: str) -> None:
    """A name, or a network with host bits, is one line that says what is allowed."""
    with pytest.raises(ConfigError, match="IP address or a network"):
        create_app(engine, Config(server=ServerConfig(trusted_proxies=(text,))))


async def test_a_proxy_may_have_any_number_of_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cap of connections per address does not count a trusted proxy's: they are everybody's."""
    monkeypatch.setattr(serve_module, "is_loopback", lambda address: False)
    limits = LimitsConfig(max_connections_per_peer=1)

    async def statuses(**settings: Any) -> list[int]:
        async with open_stub() as engine, running(create_app(engine, Config()), limits=limits, **settings) as server:
            found: list[int] = []
            for _ in range(2):
                stream = await server.connect()
                await stream.send_all(http("GET", "/version"))
                found.append((await read_response(stream))[0])
            return found

    assert await statuses() == [200, 503]
    assert await statuses(trusted_proxies=("127.0.0.1",)) == [200, 200]
