"""`trio-llm serve`: engine and server in one nursery, the signals that end them, and the exit code."""

from __future__ import annotations

import logging
import resource
import signal
from collections.abc import AsyncIterator

import attrs
import click
import trio

from trio_llm.assemble import open_engine
from trio_llm.cli.announce import LoadingDisplay, open_to_all, ready_text
from trio_llm.cli.log import configure_logging
from trio_llm.cli.settings import Settings
from trio_llm.cli.watchdog import Watchdog
from trio_llm.config import Config
from trio_llm.engine import Engine
from trio_llm.errors import ConfigError
from trio_llm.server.app import ServerApp, create_app
from trio_llm.server.disk import check_directory
from trio_llm.server.serve import serve

# What unwinding may take once everything was told to end. Pulled out of the air; a step of a large model fits in.
UNWIND_S = 15.0
# Weights, batches, logs, threads' pipes: what is open beside connections. Out of the air.
_OTHER_FILES = 256
_log = logging.getLogger(__name__)


def run(settings: Settings) -> int:
    """Serve until told to stop; return the exit code. Raises what the engine or the server died of."""
    config = settings.config
    configure_logging(config.server.log_level, config.server.log_dir)
    check_directory(config.server.data_dir)
    raise_file_limit(config.limits.max_connections + _OTHER_FILES)
    if (warning := open_to_all(config)) is not None:
        _log.warning(warning)
    try:
        trio.run(_Process(config).main)
    except BaseExceptionGroup as group:
        raise _innermost(group) from None
    return 0


def raise_file_limit(wanted: int) -> None:
    """Allow the process as many open files as its connections need, as far as its hard limit goes.

    The usual soft limit of 1,024 would end the server's accepting long before max_connections does.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < wanted:
        _log.warning("at most %d files may be open (ulimit -n -H), fewer than --max-connections needs", allowed)


def _innermost(error: BaseException) -> BaseException:
    """Take the one exception out of the nurseries that it went through; several stay a group."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


@attrs.define
class _Process:
    """One serving process: loading, then serving, then draining, then gone."""

    config: Config
    watchdog: Watchdog = attrs.field(factory=Watchdog)
    _stop: trio.Event = attrs.field(factory=trio.Event, init=False)
    _engine: Engine | None = attrs.field(default=None, init=False)

    async def main(self) -> None:
        """Run everything; a signal before the engine is there ends loading."""
        try:
            with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._obey, signals, nursery.cancel_scope)
                    await self._serve()
                    nursery.cancel_scope.cancel()
        finally:
            self.watchdog.arm(UNWIND_S)

    async def _obey(self, signals: AsyncIterator[int], everything: trio.CancelScope) -> None:
        async for number in signals:
            name = signal.Signals(number).name
            if self._engine is None or self._stop.is_set():
                _log.warning("%s: ending at once", name)
                everything.cancel()
                self.watchdog.arm(UNWIND_S)
            else:
                _log.info("%s: finishing accepted requests", name)
                self.shut_down()

    def shut_down(self) -> None:
        """Admit nothing more, let accepted requests end, then end the process. Doing it twice changes nothing."""
        if self._engine is None or self._stop.is_set():
            return
        self._engine.drain()
        self._stop.set()
        self.watchdog.arm(self.config.server.shutdown_timeout_s + UNWIND_S)

    async def _serve(self) -> None:
        with LoadingDisplay() as display:
            async with open_engine(self.config, report=display.report, tune_interpreter=True) as engine:
                display.stop()
                app = create_app(engine, self.config, shutdown=self.shut_down)
                self._engine = engine
                async with trio.open_nursery() as nursery:
                    urls = await nursery.start(self._listen, app)
                    click.echo(ready_text(self.config, engine.info, app.services.names[0], urls[0]))
                # The connections are gone; what they asked for last is aborted with the engine.

    async def _listen(self, app: ServerApp, *, task_status: trio.TaskStatus[list[str]]) -> None:
        server = self.config.server
        try:
            await serve(
                app,
                host=server.host,
                port=server.port,
                shutdown_trigger=self._stop.wait,
                graceful_timeout_s=server.shutdown_timeout_s,
                last_call=app.last_call,
                limits=self.config.limits,
                trusted_proxies=server.trusted_proxies,
                task_status=task_status,
            )
        except OSError as error:
            address = f"{server.host}:{server.port}"
            raise ConfigError("server.port", address, "settings", f"cannot listen there: {error.strerror}") from None
