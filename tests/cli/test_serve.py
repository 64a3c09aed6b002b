"""One serving process: how it starts, how signals and /shutdown end it, and what it says when it cannot."""

from __future__ import annotations

import gc
import json
import logging
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from tests.server.helpers import http, read_response, read_to_end
from tests.server.stub import GatedWorker, StubRunner, open_stub
from trio_llm.cli import serve as serve_command
from trio_llm.cli.group import innermost
from trio_llm.cli.serve import _Process, check_address, run
from trio_llm.cli.settings import Settings
from trio_llm.config import AuthConfig, Config, ServerConfig
from trio_llm.errors import ConfigError
from trio_llm.messages import StepPlan
from trio_llm.server.batches.database import Database

STREAM = json.dumps({"prompt": "a", "max_tokens": 3, "stream": True, "ignore_eos": True}).encode()
LOCAL = Config(server=ServerConfig(host="127.0.0.1", port=0, shutdown_timeout_s=60))


@attrs.define
class RecordingWatchdog:
    """Remembers its deadlines and ends nothing."""

    armed_s: list[float] = attrs.field(factory=list)

    def arm(self, timeout_s: float) -> None:
        self.armed_s.append(timeout_s)


@attrs.define
class Serving:
    """A process under test: its parts, and whether it is over."""

    process: _Process
    watchdog: RecordingWatchdog
    worker: GatedWorker
    port: int
    ended: trio.Event
    clients: AsyncExitStack

    async def send(self, request: bytes) -> trio.SocketStream:
        """Send a request on a connection of its own, which is closed with the test."""
        stream = await self.clients.enter_async_context(await trio.open_tcp_stream("127.0.0.1", self.port))
        await stream.send_all(request)
        return stream

    async def post(self, path: str, body: bytes) -> trio.SocketStream:
        """Post JSON."""
        return await self.send(http("POST", path, body, "Content-Type: application/json"))


@pytest.fixture
def stub_engine(monkeypatch: pytest.MonkeyPatch) -> GatedWorker:
    """Let `serve` open an engine without torch, whose steps wait for the test."""
    worker = GatedWorker()

    def open_engine(config: Config, **_: Any) -> Any:
        return open_stub(worker=worker)

    monkeypatch.setattr(serve_command, "open_engine", open_engine)
    return worker


@asynccontextmanager
async def running(
    worker: GatedWorker,
    capsys: pytest.CaptureFixture[str],
    config: Config = LOCAL,
    reread: Callable[[], Config] = lambda: LOCAL,
) -> AsyncIterator[Serving]:
    """Run a process's main task while the block runs."""
    watchdog = RecordingWatchdog()
    process = _Process(config, watchdog, reread)  # type: ignore[arg-type]
    ended = trio.Event()

    async def main() -> None:
        await process.main()
        ended.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(main)
        said = ""
        while "is served on" not in said:
            await trio.testing.wait_all_tasks_blocked()
            said += capsys.readouterr().out
        port = int(re.findall(r"served on http://127\.0\.0\.1:(\d+)", said)[0])
        async with AsyncExitStack() as clients:
            yield Serving(process, watchdog, worker, port, ended, clients)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_lets_accepted_requests_finish(
    number: signal.Signals, stub_engine: GatedWorker, capsys: pytest.CaptureFixture[str]
) -> None:
    """After SIGTERM or Ctrl+C nothing new is admitted, the open stream ends well, then the process ends."""
    async with running(stub_engine, capsys) as serving:
        stream = await serving.post("/v1/completions", STREAM)
        stub_engine.let(1)
        first = await stream.receive_some()
        signal.raise_signal(number)
        await trio.testing.wait_all_tasks_blocked()
        assert not serving.ended.is_set()
        stub_engine.open = True
        stub_engine.let(100)
        rest = first + await read_to_end(stream)
        assert b"data: [DONE]" in rest
        assert b'"finish_reason":"length"' in rest
        with trio.fail_after(30):
            await serving.ended.wait()
        assert serving.watchdog.armed_s[0] == LOCAL.server.shutdown_timeout_s + serve_command.UNWIND_S


async def test_garbage_is_collected_from_when_it_serves(
    stub_engine: GatedWorker, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command has switched that off for the start."""
    gc.disable()
    async with running(stub_engine, capsys):
        assert gc.isenabled()


async def test_shutdown_is_the_same_as_a_signal(stub_engine: GatedWorker, capsys: pytest.CaptureFixture[str]) -> None:
    """GET /shutdown from this machine ends the process in good order; asking twice changes nothing."""
    async with running(stub_engine, capsys) as serving:
        stream = await serving.send(http("GET", "/shutdown").replace(b"Host: x", b"Host: localhost"))
        status, _, body = await read_response(stream)
        assert (status, json.loads(body)) == (202, {"status": "draining"})
        serving.process.shut_down()
        with trio.fail_after(30):
            await serving.ended.wait()


async def test_a_second_signal_ends_at_once(stub_engine: GatedWorker, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever signals twice does not wait for requests that still run."""
    async with running(stub_engine, capsys) as serving:
        stream = await serving.post("/v1/completions", STREAM)
        stub_engine.let(1)
        await stream.receive_some()
        signal.raise_signal(signal.SIGTERM)
        await trio.testing.wait_all_tasks_blocked()
        signal.raise_signal(signal.SIGTERM)
        with trio.fail_after(30):
            await serving.ended.wait()


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
async def test_a_signal_while_loading_ends_loading(
    number: signal.Signals, exit_code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before there is an engine nothing was accepted: one signal is enough, and Ctrl-C shows in the exit code."""
    loading = trio.Event()

    @asynccontextmanager
    async def load_for_ever(config: Config, **_: Any) -> AsyncIterator[None]:
        loading.set()
        await trio.sleep_forever()
        yield

    monkeypatch.setattr(serve_command, "open_engine", load_for_ever)
    async with trio.open_nursery() as nursery:
        process = _Process(LOCAL, RecordingWatchdog())  # type: ignore[arg-type]
        nursery.start_soon(process.main)
        await loading.wait()
        signal.raise_signal(number)
        with trio.fail_after(30):
            await trio.testing.wait_all_tasks_blocked()
    assert process.exit_code == exit_code


async def test_an_engine_that_dies_takes_the_process_along(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What killed the engine is raised out of the process's main task, so that the exit code is not 0."""

    class BrokenError(BaseException):
        pass

    def break_down(plan: StepPlan) -> None:
        raise BrokenError

    def open_engine(config: Config, **_: Any) -> Any:
        return open_stub(StubRunner(hook=break_down))

    monkeypatch.setattr(serve_command, "open_engine", open_engine)
    worker = GatedWorker()
    with pytest.RaisesGroup(BrokenError, flatten_subgroups=True):
        async with running(worker, capsys) as serving:
            await serving.post("/v1/completions", STREAM)
            await trio.sleep_forever()


async def test_sighup_replaces_the_keys(
    stub_engine: GatedWorker, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """SIGHUP takes new keys and drops old ones; settings that are wrong, or would open the server, change nothing."""
    caplog.set_level("INFO", "trio_llm.cli.serve")
    path = tmp_path / "keys"
    path.write_text("first-key-of-the-test-0123456789\n")
    config = attrs.evolve(LOCAL, auth=AuthConfig(api_key_file=str(path)))
    found = [config]
    async with running(stub_engine, capsys, config, lambda: found[-1]) as serving:

        async def statuses() -> list[int]:
            seen: list[int] = []
            for name in ("first", "second"):
                key = f"Authorization: Bearer {name}-key-of-the-test-0123456789"
                status, *_ = await read_response(await serving.send(http("GET", "/v1/models", b"", key)))
                seen.append(status)
            return seen

        async def hang_up(said: str) -> None:
            signal.raise_signal(signal.SIGHUP)
            with trio.fail_after(30):
                while said not in caplog.text:
                    await trio.testing.wait_all_tasks_blocked()

        assert await statuses() == [200, 401]
        path.write_text("second-key-of-the-test-0123456789\n")
        found.append(attrs.evolve(config, server=attrs.evolve(config.server, port=1)))
        await hang_up("1 API keys are accepted; a restart is needed for server.port")
        assert await statuses() == [401, 200]
        path.write_text("")
        await hang_up("the settings stay as they were: ")
        found.append(LOCAL)
        await hang_up("no API key is left")
        assert await statuses() == [401, 200]


async def test_sighup_replaces_the_administrators(
    stub_engine: GatedWorker, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """A key that is an administrator's no longer shuts the server down; one that has become one does."""
    caplog.set_level("INFO", "trio_llm.cli.serve")
    first, second = "first-key-of-the-test-0123456789", "second-key-of-the-test-0123456789"
    found = [attrs.evolve(LOCAL, auth=AuthConfig(api_keys=(second,), admin_api_keys=(first,)))]
    async with running(stub_engine, capsys, found[0], lambda: found[-1]) as serving:
        found.append(attrs.evolve(LOCAL, auth=AuthConfig(api_keys=(first,), admin_api_keys=(second,))))
        signal.raise_signal(signal.SIGHUP)
        with trio.fail_after(30):
            while "2 API keys are accepted" not in caplog.text:
                await trio.testing.wait_all_tasks_blocked()
        seen: list[int] = []
        for key in (first, second):
            asked = http("POST", "/shutdown", b"", f"Authorization: Bearer {key}").replace(
                b"Host: x", b"Host: localhost"
            )
            status, *_ = await read_response(await serving.send(asked))
            seen.append(status)
    assert seen == [403, 202]


async def test_sighup_applies_rate_limits_and_the_log_level(
    stub_engine: GatedWorker, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Both count at once; a SIGHUP that leaves the limits as they are leaves the buckets as empty as they are."""
    caplog.set_level("INFO")
    key = "first-key-of-the-test-0123456789"
    config = attrs.evolve(LOCAL, auth=AuthConfig(api_keys=(key,), rate_limit_requests=0))
    found = [config]
    async with running(stub_engine, capsys, config, lambda: found[-1]) as serving:

        async def status() -> int:
            asked = http("GET", "/v1/models", b"", f"Authorization: Bearer {key}")
            return (await read_response(await serving.send(asked)))[0]

        async def hang_up(count: int) -> None:
            signal.raise_signal(signal.SIGHUP)
            with trio.fail_after(30):
                while caplog.text.count("SIGHUP: ") < count:
                    await trio.testing.wait_all_tasks_blocked()

        assert [await status() for _ in range(3)] == [200, 200, 200]
        limited = attrs.evolve(config, auth=attrs.evolve(config.auth, rate_limit_requests=2))
        found.append(limited)
        await hang_up(1)
        assert "auth.rate_limit_requests is applied" in caplog.text and "restart" not in caplog.text
        assert [await status() for _ in range(3)] == [200, 200, 429]
        found.append(attrs.evolve(limited, server=attrs.evolve(limited.server, log_level="warning")))
        signal.raise_signal(signal.SIGHUP)
        with trio.fail_after(30):
            while logging.getLogger().level != logging.WARNING:
                await trio.testing.wait_all_tasks_blocked()
        assert await status() == 429


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("server.port", None),
        ("server.host", "192.0.2.1"),  # an address for documentation: no machine has it
        ("server.chat_template", "/nowhere.jinja"),
        ("server.trusted_proxies", ("nonsense",)),
        ("server.allowed_origins", ("nonsense",)),
        ("auth.api_key_file", "/nowhere"),
        ("auth.require_auth", True),
    ],
)
async def test_wrong_settings_are_refused_before_the_model_loads(
    key: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What needs no model to be refused does not wait for one: loading takes from seconds to minutes."""

    def load(*_: object, **__: object) -> None:
        raise AssertionError("the model is being loaded")

    monkeypatch.setattr("trio_llm.cli.serve.configure_logging", lambda *_: None)
    monkeypatch.setattr("trio_llm.cli.serve._Process", load)
    section, name = key.split(".")
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        taken = listener.socket.getsockname()[1]
        settings = {"host": "127.0.0.1", "port": taken if key == "server.port" else 0}
        if section == "server" and value is not None:
            settings[name] = value
        auth = {name: value} if section == "auth" else {}
        config = Config(server=ServerConfig(**settings), auth=AuthConfig(**auth))
        with pytest.raises(ConfigError) as caught:
            run(Settings(config, {}), lambda: Settings(config, {}))
    assert caught.value.key == ("server.port" if key == "server.host" else key)


def test_a_free_port_is_left_free() -> None:
    """The check of an address listens to nothing and keeps nothing."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    check_address("127.0.0.1", port)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    check_address("127.0.0.1", port)


def test_a_host_that_is_none_is_named_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that cannot be looked up is a fault of the host, not of the port."""

    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(ConfigError, match=r"server\.host = 'a b:8000': cannot listen there"):
        check_address("a b", 8000)


async def test_a_port_in_use_is_a_wrong_setting(stub_engine: GatedWorker) -> None:
    """An address that cannot be listened on is told as the setting it is."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        taken = listener.socket.getsockname()[1]
        config = Config(server=ServerConfig(host="127.0.0.1", port=taken))
        with pytest.RaisesGroup(
            pytest.RaisesExc(ConfigError, match=f"'127.0.0.1:{taken}': cannot listen there"), flatten_subgroups=True
        ):
            await _Process(config, RecordingWatchdog()).main()  # type: ignore[arg-type]


def test_one_error_is_taken_out_of_its_nurseries() -> None:
    """A lone exception loses its wrapping, however deep; several stay together."""
    lone = ValueError()
    assert innermost(ExceptionGroup("", [ExceptionGroup("", [lone])])) is lone
    several = ExceptionGroup("", [ValueError(), TypeError()])
    assert innermost(ExceptionGroup("", [several])) is several


@pytest.mark.slow
def test_the_demo_model_answers_over_http() -> None:
    """The real process with the model that ships answers the question of the README and ends with code 0."""
    command = [sys.executable, "-m", "trio_llm", "serve", "--host", "127.0.0.1", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = next(match[1] for line in process.stdout if (match := re.search(r"served on (http://\S+)\.", line)))
        question = {"messages": [{"role": "user", "content": "What is the capital of Japan?"}], "temperature": 0}
        request = urllib.request.Request(
            f"{url}/v1/chat/completions", json.dumps(question).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as response:
            answer = json.load(response)
        process.send_signal(signal.SIGTERM)
    assert "Tokyo" in answer["choices"][0]["message"]["content"]
    assert process.returncode == 0


def test_a_data_directory_has_one_server(tmp_path: Path) -> None:
    """A second server on a data directory is refused in one line, before it loads a model, with exit code 2."""
    with Database(tmp_path):
        command = [sys.executable, "-m", "trio_llm", "serve", "--data-dir", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    told = (
        f"error: data directory: server.data_dir = '{tmp_path}': "
        "must not be in use by another server (give this one its own --data-dir)\n"
    )
    assert [line for line in done.stderr.splitlines(keepends=True) if not line.startswith("{")] == [told]
