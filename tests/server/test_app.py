"""What holds for every endpoint: the shape of errors, keys, limits, headers."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from tests.server.helpers import Answer, ask, http, read_response, running
from tests.server.stub import GatedWorker, StubRunner, open_stub, stub_tokenizer
from trio_llm.config import AuthConfig, Config, LimitsConfig, ServerConfig
from trio_llm.engine import Engine
from trio_llm.errors import ConfigError
from trio_llm.server.access.auth import load_keys
from trio_llm.server.app import ServerApp, create_app

KEY = "sk-0123456789abcdef"
REMOTE = ("192.0.2.7", 1234)
COMPLETION = {"prompt": "hello", "max_tokens": 2}
TEXT, GZIP = {"content-type": "text/plain"}, {"content-encoding": "gzip"}


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    """Return an engine round the stub."""
    async with open_stub() as engine:
        yield engine


@pytest.fixture
async def app(engine: Engine) -> ServerApp:
    """Return an open app."""
    return create_app(engine, Config())


def keyed(engine: Engine, **auth: Any) -> ServerApp:
    """Return an app behind a key."""
    return create_app(engine, Config(auth=AuthConfig(api_keys=(KEY, "sk-second"), **auth)))


def check_error(answer: Answer, status: int, kind: str) -> dict[str, Any]:
    """Check that an answer is OpenAI's error object, and return it."""
    assert answer.status == status, answer.body
    assert answer.headers["content-type"].startswith("application/json")
    assert answer.headers["x-request-id"]
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == kind
    assert error["message"]
    return error


@pytest.mark.parametrize(
    ("method", "path", "options", "status", "kind"),
    [
        ("GET", "/nope", {}, 404, "not_found_error"),
        ("GET", "/v1/models/nope", {}, 404, "not_found_error"),
        ("GET", "/v1/completions", {}, 405, "invalid_request_error"),
        ("QUERY", "/v1/completions", {}, 405, "invalid_request_error"),
        ("POST", "/v1/completions", {"body": b"{"}, 400, "invalid_request_error"),
        ("POST", "/v1/completions", {"body": b""}, 400, "invalid_request_error"),
        ("POST", "/v1/completions", {"body": b"[]"}, 400, "invalid_request_error"),
        ("POST", "/v1/completions", {"body": b"{}", "headers": TEXT}, 415, "invalid_request_error"),
        ("POST", "/v1/completions", {"body": b"{}", "headers": GZIP}, 415, "invalid_request_error"),
        ("POST", "/v1/completions", {"body": {"prompt": "a", "model": "gpt-4"}}, 404, "not_found_error"),
    ],
)  # fmt: skip
async def test_every_refusal_is_an_error_object(
    app: ServerApp, method: str, path: str, options: dict[str, Any], status: int, kind: str
) -> None:
    """L11: whatever is refused, and wherever, is OpenAI's error object with a request id, never Quart's HTML."""
    check_error(await ask(app, method, path, **options), status, kind)


async def test_a_body_too_large_is_a_413_error_object(engine: Engine) -> None:
    """The body limit counts announced and chunked bodies alike and is named in the error."""
    app = create_app(engine, Config(limits=LimitsConfig(max_body_bytes=1000)))
    async with running(app) as server:
        for framing in ("Content-Length: 2000", "Transfer-Encoding: chunked"):
            stream = await server.connect()
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{framing}\r\n\r\n"
            body = bytes(2000) if "Length" in framing else b"7d0\r\n" + bytes(2000) + b"\r\n0\r\n\r\n"
            await stream.send_all(head.encode() + body)
            status, _, answer = await read_response(stream)
            assert status == 413
            assert b"1000 bytes" in answer


async def test_a_body_that_drips_times_out(engine: Engine, mock_clock: trio.testing.MockClock) -> None:
    """L6: a body that does not arrive in time is a 408, and the connection closes."""
    async with running(create_app(engine, Config())) as server:
        stream = await server.connect()
        await stream.send_all(http("POST", "/v1/completions", b"{}", "Content-Type: application/json")[:-1])
        await trio.testing.wait_all_tasks_blocked(0.01)
        mock_clock.jump(LimitsConfig().body_timeout_s + 1)
        await trio.testing.wait_all_tasks_blocked(0.01)
        mock_clock.jump(5)  # the edge waits so long for the rest before it answers
        status, headers, _ = await read_response(stream)
        assert (status, headers["connection"]) == (408, "close")
        assert await stream.receive_some() == b""


async def test_unexpected_errors_keep_their_text_to_themselves(
    app: ServerApp, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An exception nobody expected is a 500 whose text goes to the log and not to the client."""
    monkeypatch.setattr(type(app.services), "check_model", lambda self, name: 1 / 0)
    answer = await ask(app, "POST", "/v1/completions", COMPLETION)
    error = check_error(answer, 500, "internal_server_error")
    assert "zero" not in error["message"]
    assert "ZeroDivisionError" in caplog.text


async def test_request_ids_are_echoed_and_made(app: ServerApp) -> None:
    """A client's x-request-id comes back; without a usable one the server makes one. Ids of answers are ours."""
    given = await ask(app, "POST", "/v1/completions", COMPLETION, headers={"x-request-id": "mine-1"})
    assert given.headers["x-request-id"] == "mine-1"
    assert "mine-1" not in given.json()["id"]
    for bad in ("", "é", "x" * 129):
        answer = await ask(app, "GET", "/health", headers={"x-request-id": bad})
        assert answer.headers["x-request-id"].startswith("req-")


async def test_each_request_is_one_log_line(app: ServerApp, caplog: pytest.LogCaptureFixture) -> None:
    """The log has a line per request with its id, in words of ours: nothing a client sends can forge another line."""
    caplog.set_level("INFO", "trio_llm.server.app")
    await ask(app, "GET", "/x\nforged", headers={"x-request-id": "mine"})
    assert [record.message for record in caplog.records] == ["GET /x%0Aforged from 127.0.0.1 404, request mine"]


async def test_unknown_fields_are_answered_with_a_warning(app: ServerApp) -> None:
    """A field nobody knows changes nothing, but is named in a Warning header, in plain characters."""
    extra = {"frobnicate": 1, "évil\r\nX: 1": 2, "stream_options": None}
    answer = await ask(app, "POST", "/v1/completions", {**COMPLETION, **extra})
    assert answer.status == 200
    assert answer.headers["warning"] == '299 trio-llm "Ignored unknown fields: frobnicate, ?vil??X??1"'
    assert "warning" not in (await ask(app, "POST", "/v1/completions", COMPLETION)).headers


async def test_models_are_listed_and_found(engine: Engine) -> None:
    """Every name is listed with the context length, found by itself, and answered with."""
    app = create_app(engine, Config(server=ServerConfig(served_model_name=("org/a", "b"))))
    listed = (await ask(app, "GET", "/v1/models")).json()
    assert [(card["id"], card["object"], card["max_model_len"]) for card in listed["data"]] == [
        ("org/a", "model", 512),
        ("b", "model", 512),
    ]
    assert (await ask(app, "GET", "/v1/models/org/a")).json()["id"] == "org/a"
    for asked, answered in ((None, "org/a"), ("b", "b")):
        body = {**COMPLETION, "model": asked}
        assert (await ask(app, "POST", "/v1/completions", body)).json()["model"] == answered


async def test_the_default_name_is_the_directory(app: ServerApp) -> None:
    """Without a configured name the model answers to the last part of its path."""
    assert (await ask(app, "GET", "/v1/models")).json()["data"][0]["id"] == "stub"


SPELLINGS = [
    "{}", "/{}", "{}/", "{}?x=/health", "{}#/health", "/.{}", "/health/..{}", "{}%00", "{};/health", "http://evil{}",
    "{}%2f", "//health{}",
]  # fmt: skip


def percent(path: str) -> str:
    """Spell a path in percent escapes."""
    return "/" + "".join(f"%{ord(c):02x}" for c in path[1:])


async def test_no_spelling_gets_round_the_key(engine: Engine) -> None:
    """L1: without a key every spelling of every route is refused, before it is said whether it exists."""
    app = keyed(engine)
    rules = sorted({rule.rule.replace("<path:model>", "stub") for rule in app.url_map.iter_rules()})
    assert "/v1/chat/completions" in rules
    # /metrics: the peer is this machine. The page's files say nothing.
    public = {"/health", "/ready", "/ping", "/metrics", "/", "/ui/<path:asset>"}
    async with running(app) as server:
        for rule in [*rules, "/nope"]:
            for target in [*(spelling.format(rule) for spelling in SPELLINGS), percent(rule)]:
                for method in ("GET", "POST"):
                    stream = await server.connect()
                    await stream.send_all(http(method, target))
                    status, _, body = await read_response(stream)
                    opens = rule in public and status in {200, 404, 405}
                    assert status in {400, 401} or opens, (method, target, status, body)
                    await stream.aclose()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"authorization": f"Bearer {KEY}"}, 200),
        ({"authorization": f"bearer  {KEY} "}, 200),
        ({"x-api-key": KEY}, 200),
        ({"x-api-key": "sk-second"}, 200),
        ({"authorization": "Bearer wrong", "x-api-key": KEY}, 200),
        ({}, 401),
        ({"authorization": "Bearer"}, 401),
        ({"authorization": KEY}, 401),
        ({"authorization": f"Basic {KEY}"}, 401),
        ({"authorization": f"Bearer {KEY[:-1]}"}, 401),
        ({"authorization": f"Bearer {KEY}x"}, 401),
        ({"x-api-key": "é"}, 401),
        ({"x-api-key": ""}, 401),
    ],
)
async def test_keys(engine: Engine, headers: dict[str, str], status: int) -> None:
    """A key opens as Bearer token or x-api-key; anything else, non-ASCII too, is a 401 and not a failure."""
    answer = await ask(keyed(engine), "POST", "/v1/completions", COMPLETION, headers=headers)
    if status == 401:
        assert check_error(answer, 401, "authentication_error")["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.status == status


def test_the_key_file_counts(tmp_path: Path) -> None:
    """Keys of the file, one a line, are accepted beside the configured ones; an empty or missing file is an error."""
    path = tmp_path / "keys"
    path.write_text("# of the team\nalpha\n\nbeta\n")
    keys = load_keys(AuthConfig(api_keys=("gamma",), api_key_file=str(path)))
    ids = [keys.identify([key]) for key in (b"alpha", b"beta", b"gamma")]
    assert len(set(ids)) == 3
    assert None not in ids
    assert keys.identify([b"# of the team", b""]) is None
    path.write_text("\n")
    for file in (path, tmp_path / "missing"):
        with pytest.raises(ConfigError, match="api_key_file"):
            load_keys(AuthConfig(api_key_file=str(file)))


def test_a_key_file_may_be_mounted_as_a_secret(tmp_path: Path) -> None:
    """Kubernetes mounts a secret as links, and swaps a directory of them to change it: both are followed."""

    def mount(version: str, key: str) -> None:
        directory = tmp_path / f"..{version}"
        directory.mkdir()
        (directory / "keys").write_text(key + "\n")
        (tmp_path / "..data_tmp").symlink_to(directory.name)
        (tmp_path / "..data_tmp").replace(tmp_path / "..data")

    config = AuthConfig(api_key_file=str(tmp_path / "keys"))
    mount("2026_11_28", "first-key-0123456789")
    (tmp_path / "keys").symlink_to(Path("..data") / "keys")
    assert load_keys(config).identify([b"first-key-0123456789"])
    mount("2026_11_29", "second-key-0123456789")
    keys = load_keys(config)
    assert keys.identify([b"second-key-0123456789"]) and not keys.identify([b"first-key-0123456789"])


def test_keys_of_a_process_substitution_are_refused_in_words() -> None:
    """`--api-key-file <(...)` is a pipe that a SIGHUP could not read again: the error says what to do."""
    reader, writer = os.pipe()
    try:
        os.write(writer, b"some-key-0123456789\n")
        with pytest.raises(ConfigError, match=r"api_key_file.*a pipe: write its text to a file, and name that"):
            load_keys(AuthConfig(api_key_file=f"/dev/fd/{reader}"))
    finally:
        os.close(reader)
        os.close(writer)


def unreadable_files(directory: Path) -> dict[str, str]:
    """Make files that no setting may name: path and what is said of it."""
    pipe, binary, large = directory / "pipe", directory / "binary", directory / "large"
    os.mkfifo(pipe)
    binary.write_bytes(b"\xff\xfe")
    large.touch()
    os.truncate(large, 1 << 30)
    return {
        str(pipe): "not a regular file but a pipe: write its text to a file",
        "/dev/zero": "not a regular file",
        str(binary): "not UTF-8",
        str(large): "more than the 1048576 allowed",
        str(directory): "not a regular file",
        "a\0b": "cannot be read",
    }


async def test_files_that_settings_name_are_read_with_care(engine: Engine, tmp_path: Path) -> None:
    """A pipe, a device, a huge file or one that is no text is one clear error; no start hangs on it."""
    for path, reason in unreadable_files(tmp_path).items():
        with pytest.raises(ConfigError, match=f"api_key_file.*{reason}"):
            create_app(engine, Config(auth=AuthConfig(api_key_file=path)))
        with pytest.raises(ConfigError, match=f"chat_template.*{reason}"):
            create_app(engine, Config(server=ServerConfig(chat_template=path)))


async def test_a_required_key_must_be_there(engine: Engine) -> None:
    """require_auth without a key refuses to start instead of serving everybody."""
    with pytest.raises(ConfigError, match="require_auth"):
        create_app(engine, Config(auth=AuthConfig(require_auth=True)))


async def test_keys_are_limited_apart(engine: Engine) -> None:
    """Each key has its own bucket; an empty one is a 429 with the time to wait, which then suffices."""
    now = 0.0
    config = Config(auth=AuthConfig(api_keys=(KEY, "b"), rate_limit_requests=2, rate_limit_window_secs=60))
    app = create_app(engine, config, clock=lambda: now)

    async def get(key: str) -> Answer:
        return await ask(app, "GET", "/v1/models", headers={"x-api-key": key})

    first = await get(KEY)
    assert (first.headers["x-ratelimit-limit-requests"], first.headers["x-ratelimit-remaining-requests"]) == ("2", "1")
    assert (await get(KEY)).status == 200
    refused = await get(KEY)
    assert check_error(refused, 429, "rate_limit_error")["code"] == "rate_limit_exceeded"
    assert (refused.headers["retry-after"], refused.headers["retry-after-ms"]) == ("30", "30000")
    assert refused.headers["x-ratelimit-reset-requests"] == "60.000s"
    assert (await get("b")).status == 200
    now = 30.0
    assert (await get(KEY)).status == 200
    assert (await get(KEY)).status == 429


async def test_without_keys_remote_peers_are_limited(engine: Engine) -> None:
    """Peers are limited by the socket's address, IPv6 ones by their /64, whatever headers claim; this host is not."""
    app = create_app(engine, Config(auth=AuthConfig(rate_limit_requests=1)), clock=lambda: 0.0)

    async def status(address: str, **headers: str) -> int:
        options = {
            "client": (address, 1),
            "headers": {name.replace("_", "-"): value for name, value in headers.items()},
        }
        return (await ask(app, "GET", "/v1/models", **options)).status

    assert [await status("192.0.2.7"), await status("192.0.2.7", x_forwarded_for="192.0.2.8")] == [200, 429]
    assert [await status("192.0.2.7", remote_addr="127.0.0.1"), await status("192.0.2.8")] == [429, 200]
    assert [await status("2001:db8::1"), await status("2001:db8::2"), await status("2001:db8:1::1")] == [200, 429, 200]
    assert [await status("127.0.0.1") for _ in range(3)] == [200, 200, 200]
    assert [await status("::1") for _ in range(2)] == [200, 200]


async def test_a_refused_request_costs_no_parsing(engine: Engine) -> None:
    """Key and rate are checked before the body is looked at: rubbish without a key is a 401, not a 400."""
    check_error(await ask(keyed(engine), "POST", "/v1/completions", b"\xff"), 401, "authentication_error")


async def test_health_tells_the_truth(mock_clock: trio.testing.MockClock, nursery: trio.Nursery) -> None:
    """/health and /ping are 200 while steps finish, and 503 when work stands still or the engine drains."""
    worker = GatedWorker()
    async with open_stub(worker=worker, stall_after_s=30.0) as engine:
        app = create_app(engine, Config())

        async def check(status: int, state: str) -> None:
            for path in ("/health", "/ping"):
                answer = await ask(app, "GET", path)
                assert (answer.status, answer.json()) == (status, {"status": state})

        await check(200, "ok")
        nursery.start_soon(ask, app, "POST", "/v1/completions", COMPLETION)
        await trio.testing.wait_all_tasks_blocked()
        worker.let(1)  # The first step has longer.
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(31)
        await check(503, "stalled")
        worker.let(10)
        await trio.testing.wait_all_tasks_blocked()
        await check(200, "ok")
        engine.drain()
        await check(503, "draining")
        answer = await ask(app, "POST", "/v1/completions", COMPLETION)
        assert check_error(answer, 503, "service_unavailable_error")["code"] == "draining"
        assert answer.headers["retry-after"]


async def test_metrics(engine: Engine) -> None:
    """The engine's and the server's series are served, to HEAD as well, and made-up paths make no new series."""
    app = create_app(engine, Config())
    for path in ("/a", "/b", "/v1/models/x", "/v1/models/y"):
        await ask(app, "GET", path)
        await ask(app, "BREW", path)
    text = (await ask(app, "GET", "/metrics")).body.decode()
    assert "vllm:num_requests_running" in text
    assert "trio_llm_auth_enabled 0.0" in text
    assert 'http_requests_total{handler="unmatched",method="GET",status="404"} 2.0' in text
    assert 'http_requests_total{handler="unmatched",method="other",status="404"} 2.0' in text
    assert 'handler="/v1/models/<path:model>",method="GET",status="404"} 2.0' in text
    assert "/v1/models/x" not in text
    head = await ask(app, "HEAD", "/metrics")
    assert head.status == 200
    assert head.headers["content-type"].startswith("text/plain; version=")


async def test_short_keys_are_warned_of(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    """A key that can be guessed is pointed out at start, without a character of it; and the gauge tells of any."""
    for keys, num_short in (((KEY,), 0), (("short", KEY), 1)):
        caplog.clear()
        app = create_app(engine, Config(auth=AuthConfig(api_keys=keys, admin_api_keys=("x" * 16,))))
        told = [record.message for record in caplog.records]
        assert told == ["1 API keys have fewer than 16 characters: they can be guessed"] * num_short
    assert "trio_llm_auth_enabled 1.0" in (await ask(app, "GET", "/metrics")).body.decode()


async def test_the_load_is_what_is_under_way(nursery: trio.Nursery) -> None:
    """/load counts the requests that are not answered, for balancers that know vLLM's, and forgets those that are."""
    worker = GatedWorker()
    async with open_stub(worker=worker) as engine:
        app = create_app(engine, Config())
        nursery.start_soon(ask, app, "POST", "/v1/completions", {**COMPLETION, "n": 3})
        nursery.start_soon(ask, app, "POST", "/v1/embeddings", {"input": "x"})
        await trio.testing.wait_all_tasks_blocked()
        assert (await ask(app, "GET", "/load")).json() == {"server_load": 2}
        worker.open = True
        worker.let(10)
        await trio.testing.wait_all_tasks_blocked()
        assert (await ask(app, "GET", "/load")).json() == {"server_load": 0}


async def test_metrics_from_elsewhere_need_the_key(engine: Engine) -> None:
    """With keys, /metrics is open to this machine alone, and not to what a proxy on it forwards."""
    app = keyed(engine)
    assert (await ask(app, "GET", "/metrics")).status == 200
    assert (await ask(app, "GET", "/metrics", headers={"x-forwarded-for": "192.0.2.1"})).status == 401
    assert (await ask(app, "GET", "/metrics", client=REMOTE)).status == 401
    assert (await ask(app, "GET", "/metrics", client=REMOTE, headers={"x-api-key": KEY})).status == 200
    assert (await ask(create_app(engine, Config()), "GET", "/metrics", client=REMOTE)).status == 200


SHUTDOWN_CASES: list[tuple[str, dict[str, str], tuple[str, int], bool, int]] = [
    # what, headers, peer, keys configured, status
    ("GET", {}, ("127.0.0.1", 1), False, 202),
    ("POST", {}, ("::1", 1), False, 202),
    ("GET", {"host": "127.0.0.1:8000"}, ("127.0.0.1", 1), False, 202),
    ("GET", {"host": "[::1]:8000"}, ("127.0.0.1", 1), False, 202),
    ("GET", {"sec-fetch-site": "none"}, ("127.0.0.1", 1), False, 202),
    ("HEAD", {}, ("127.0.0.1", 1), False, 405),
    ("OPTIONS", {}, ("127.0.0.1", 1), False, 405),
    ("GET", {}, REMOTE, False, 403),
    ("GET", {"x-forwarded-for": "127.0.0.1"}, REMOTE, False, 403),
    ("GET", {"remote-addr": "127.0.0.1"}, REMOTE, False, 403),
    ("GET", {"x-forwarded-for": "127.0.0.1"}, ("127.0.0.1", 1), False, 403),
    ("GET", {"forwarded": "for=127.0.0.1"}, ("127.0.0.1", 1), False, 403),
    ("GET", {"origin": "http://localhost"}, ("127.0.0.1", 1), False, 403),
    ("GET", {"origin": "null"}, ("127.0.0.1", 1), False, 403),
    ("GET", {"referer": "http://localhost/"}, ("127.0.0.1", 1), False, 403),
    ("GET", {"sec-fetch-site": "same-origin"}, ("127.0.0.1", 1), False, 403),
    ("GET", {"host": "evil.example"}, ("127.0.0.1", 1), False, 403),
    ("GET", {"host": "localhost.evil.example"}, ("127.0.0.1", 1), False, 403),
    ("GET", {"host": "127.0.0.1.evil.example"}, ("127.0.0.1", 1), False, 403),
    ("GET", {}, ("127.0.0.1", 1), True, 401),
    ("GET", {"x-api-key": "wrong"}, REMOTE, True, 401),
    ("GET", {"x-api-key": KEY}, ("127.0.0.1", 1), True, 202),
    ("GET", {"x-api-key": KEY, "host": "llm.example:8000"}, REMOTE, True, 202),
    ("GET", {"x-api-key": KEY, "origin": "http://llm.example"}, REMOTE, True, 403),
]


@pytest.mark.parametrize(("method", "headers", "client", "with_keys", "status"), SHUTDOWN_CASES)
async def test_shutdown_is_for_the_operator_only(
    engine: Engine, method: str, headers: dict[str, str], client: tuple[str, int], with_keys: bool, status: int
) -> None:
    """/shutdown works from this machine, from elsewhere with a key, and never for a web page or through a proxy."""
    calls: list[int] = []
    auth = AuthConfig(api_keys=(KEY,) if with_keys else ())
    app = create_app(engine, Config(auth=auth), shutdown=lambda: calls.append(1))
    answer = await ask(app, method, "/shutdown", headers=headers, client=client)
    assert answer.status == status, answer.body
    assert len(calls) == (status == 202)
    if status == 202:
        assert answer.json() == {"status": "draining"}


async def test_shutdown_checks_the_configured_host(engine: Engine) -> None:
    """With a key, a server that listens on one address answers to that name and to no other."""
    config = Config(server=ServerConfig(host="10.0.0.5"), auth=AuthConfig(api_keys=(KEY,)))
    app = create_app(engine, config, shutdown=lambda: None)
    for host, status in (("10.0.0.5:8000", 202), ("evil.example", 403)):
        headers = {"x-api-key": KEY, "host": host}
        assert (await ask(app, "GET", "/shutdown", headers=headers, client=REMOTE)).status == status


async def test_shutdown_can_be_switched_off(engine: Engine) -> None:
    """Switched off, /shutdown does not exist; without anything to shut down it says so."""
    app = create_app(engine, Config(server=ServerConfig(enable_shutdown=False)), shutdown=lambda: None)
    assert (await ask(app, "GET", "/shutdown")).status == 404
    assert (await ask(create_app(engine, Config()), "GET", "/shutdown")).status == 501


async def test_a_template_file_is_read_or_refused(engine: Engine, tmp_path: Path) -> None:
    """A configured template wins over the model's; one that cannot be read or parsed refuses to start."""
    path = tmp_path / "t.jinja"
    path.write_text("Q:{{ messages[0].content }}")
    config = Config(server=ServerConfig(chat_template=str(path)))
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    answer = await ask(create_app(engine, config), "POST", "/v1/chat/completions", body)
    assert answer.json()["usage"]["prompt_tokens"] == 3
    path.write_text("{% if")
    with pytest.raises(Exception, match="template"):
        create_app(engine, config)
    path.unlink()
    with pytest.raises(ConfigError, match="chat_template"):
        create_app(engine, config)


async def test_a_model_without_a_template_completes_but_does_not_chat() -> None:
    """Without a template, or with a broken one, chat is a 400 that says what to do; completions work."""
    for template in (None, "{% if"):
        async with open_stub(StubRunner(), stub_tokenizer(template)) as engine:
            app = create_app(engine, Config())
            body = {"messages": [{"role": "user", "content": "x"}]}
            error = check_error(await ask(app, "POST", "/v1/chat/completions", body), 400, "invalid_request_error")
            assert "--chat-template" in error["message"]
            assert (await ask(app, "POST", "/v1/completions", COMPLETION)).status == 200
