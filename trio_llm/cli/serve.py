"""`trio-llm serve`: engine and server in one nursery, the signals that end them, and the exit code."""

from __future__ import annotations

import errno
import gc
import logging
import resource
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator

import attrs
import click
import trio

from trio_llm.assemble import open_engine
from trio_llm.cli.announce import LoadingDisplay, open_to_all, ready_text
from trio_llm.cli.group import INTERRUPTED
from trio_llm.cli.log import configure_logging, set_level
from trio_llm.cli.settings import Settings
from trio_llm.cli.watchdog import Watchdog
from trio_llm.config import Config
from trio_llm.engine import Engine
from trio_llm.errors import ConfigError
from trio_llm.server.access.auth import ApiKeys, load_keys
from trio_llm.server.app import ServerApp, check_settings, create_app
from trio_llm.server.batches.disk import check_directory
from trio_llm.server.http.serve import serve
from trio_llm.server.templates.render_pool import shared_pool

# Seconds that unwinding may take after everything was cancelled. A guess; a step of a large model fits in.
UNWIND_S = 15.0
# Open files other than connections: weights, batches, logs, threads' pipes. A guess.
_OTHER_FILES = 256
_KEY_SETTINGS = frozenset({"auth.api_keys", "auth.api_key_file", "auth.admin_api_keys"})
_RATE_SETTINGS = frozenset({"auth.rate_limit_requests", "auth.rate_limit_tokens", "auth.rate_limit_window_secs"})
_LEVEL = "server.log_level"
# What SIGHUP applies. Everything else is read once, by the engine, the listener or the routes.
_RELOADED = _KEY_SETTINGS | _RATE_SETTINGS | {_LEVEL}
_log = logging.getLogger(__name__)


def run(settings: Settings, reread: Callable[[], Settings]) -> int:
    """Serve until a signal or /shutdown; return the exit code. Raises what the engine or the server died of.

    `reread` reads the settings again, for SIGHUP.
    """
    config = settings.config
    configure_logging(config.server.log_level, config.server.log_dir)
    check_directory(config.server.data_dir)
    check_settings(config)
    check_address(config.server.host, config.server.port)
    raise_file_limit(config.limits.max_connections + _OTHER_FILES)
    if (warning := open_to_all(config)) is not None:
        _log.warning(warning)
    shared_pool().start()  # Its imports run beside torch's, which take one core.
    process = _Process(config, reread=lambda: reread().config)
    trio.run(process.main)
    return process.exit_code


def check_address(host: str, port: int) -> None:
    """Raise ConfigError if the address cannot be listened on: at once, not after loading a model.

    It is bound and released. A client that waits for the server must not connect before it serves.
    """
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(address)
    except OSError as error:
        if error.errno != errno.EAFNOSUPPORT:  # One family of several is enough: listening decides.
            raise _cannot_listen(host, port, error) from None


def _cannot_listen(host: str, port: int, error: OSError) -> ConfigError:
    wrong = "server.host" if isinstance(error, socket.gaierror) else "server.port"
    return ConfigError(wrong, f"{host}:{port}", "settings", f"cannot listen there: {error.strerror}")


def raise_file_limit(num_files: int) -> None:
    """Allow the process as many open files as its connections need, as far as its hard limit goes.

    The usual soft limit of 1,024 would end the server's accepting long before max_connections does.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = num_files if hard == resource.RLIM_INFINITY else min(num_files, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < num_files:
        _log.warning("at most %d files may be open (ulimit -n -H), fewer than --max-connections needs", allowed)


def _changed(old: Config, new: Config) -> Iterator[str]:
    """Name the settings that differ."""
    for section in attrs.fields(Config):
        before, after = getattr(old, section.name), getattr(new, section.name)
        for field in attrs.fields(type(before)):
            name = f"{section.name}.{field.name}"
            if getattr(before, field.name) != getattr(after, field.name):
                yield name


@attrs.define
class _Process:
    """One serving process: loading, then serving, then draining, then gone."""

    config: Config
    watchdog: Watchdog = attrs.field(factory=Watchdog)
    reread: Callable[[], Config] = attrs.field(default=attrs.Factory(lambda self: lambda: self.config, takes_self=True))
    exit_code: int = attrs.field(default=0, init=False)
    _stop: trio.Event = attrs.field(factory=trio.Event, init=False)
    _engine: Engine | None = attrs.field(default=None, init=False)
    _app: ServerApp | None = attrs.field(default=None, init=False)
    # The settings of the last SIGHUP.
    _applied: Config = attrs.field(default=attrs.Factory(lambda self: self.config, takes_self=True), init=False)

    async def main(self) -> None:
        """Run everything; a signal before the engine is ready ends loading."""
        try:
            with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._obey, signals, nursery.cancel_scope)
                    await self._serve()
                    nursery.cancel_scope.cancel()
        finally:
            self.watchdog.arm(UNWIND_S)

    async def _obey(self, signals: AsyncIterator[int], everything: trio.CancelScope) -> None:
        async for number in signals:
            name = signal.Signals(number).name
            if number == signal.SIGHUP:
                await self._reload()
            elif self._engine is None or self._stop.is_set():
                _log.warning("%s: ending at once", name)
                if self._engine is None and number == signal.SIGINT:
                    self.exit_code = INTERRUPTED
                everything.cancel()
                self.watchdog.arm(UNWIND_S)
            else:
                _log.info("%s: finishing accepted requests", name)
                self.shut_down()

    async def _reload(self) -> None:
        """Read the settings again and apply those that can change; log the others that have changed."""
        if self._app is None:
            return  # Still loading. The signal ends no process that is about to serve.
        try:
            config = await trio.to_thread.run_sync(self.reread)
            keys = await trio.to_thread.run_sync(load_keys, config.auth)
        except ConfigError as error:
            _log.error("SIGHUP: the settings stay as they were: %s", error)
            return
        if self._app.services.keys and not keys:
            _log.error("SIGHUP: the settings stay as they were: no API key is left, and the server would be open")
            return
        self._app.services.keys = keys
        self._app.services.administrators = ApiKeys(config.auth.admin_api_keys)
        changed = set(_changed(self._applied, config))
        self._applied = config
        if changed & _RATE_SETTINGS:  # Else the buckets stay as full as they are.
            self._app.rate_limits.configure(config.auth)
        if _LEVEL in changed:
            set_level(config.server.log_level)
        applied = "".join(f", {name} is applied" for name in sorted(changed & _RELOADED - _KEY_SETTINGS))
        waiting = ", ".join(name for name in _changed(self.config, config) if name not in _RELOADED)
        restart = waiting and f"; a restart is needed for {waiting}"
        _log.info("SIGHUP: %d API keys are accepted%s%s", len(keys), applied, restart)

    def shut_down(self) -> None:
        """Admit nothing more after --drain-delay, let accepted requests end, then end the process; twice is once."""
        if self._engine is None or self._stop.is_set():
            return
        server = self.config.server
        assert self._app is not None
        self._app.services.draining = True  # /ready says so at once.
        if not server.drain_delay_s:
            self._engine.drain()
        self._stop.set()
        self.watchdog.arm(server.drain_delay_s + server.shutdown_timeout_s + UNWIND_S)

    async def _stop_accepting(self) -> None:
        """Return when nothing more is to be accepted: --drain-delay after the shutdown began."""
        await self._stop.wait()
        await trio.sleep(self.config.server.drain_delay_s)
        assert self._engine is not None
        self._engine.drain()

    async def _serve(self) -> None:
        with LoadingDisplay() as display:
            async with open_engine(self.config, report=display.report, tune_interpreter=True) as engine:
                display.stop()
                gc.enable()
                self._app = app = create_app(engine, self.config, shutdown=self.shut_down)
                if app.services.template is None:
                    shared_pool().close()
                self._engine = engine
                async with trio.open_nursery() as nursery:
                    urls = await nursery.start(self._listen, app)
                    click.echo(ready_text(self.config, engine.info, app.services.names[0], urls[0]))
                # The connections are closed; their last requests are aborted with the engine.

    async def _listen(self, app: ServerApp, *, task_status: trio.TaskStatus[list[str]]) -> None:
        server = self.config.server
        try:
            await serve(
                app,
                host=server.host,
                port=server.port,
                shutdown_trigger=self._stop_accepting,
                graceful_timeout_s=server.shutdown_timeout_s,
                last_call=app.last_call,
                answer_probe=app.probes.answer,
                limits=self.config.limits,
                trusted_proxies=server.trusted_proxies,
                task_status=task_status,
            )
        except OSError as error:
            raise _cannot_listen(server.host, server.port, error) from None
