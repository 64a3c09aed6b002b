"""The tasks that run while the app serves. A task that fails is restarted, and /health shows it.

Two failures end the server instead: a dead actor of the engine (see `engine.supervisor`), and a BaseException that is
not an Exception, which ends the app's lifespan and `serve`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager

import trio
from prometheus_client import CollectorRegistry, Counter
from quart_trio import QuartTrio

logger = logging.getLogger(__name__)

Task = Callable[[], Awaitable[None]]

_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 60.0


class Background:
    """Starts, restarts and stops the background tasks of one app.

    Args:
        registry: Gets the counter of failures.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._failures = Counter(
            "trio_llm_background_task_failures",
            "Failures of background tasks; the log has each, and the task is restarted.",
            ["task"],
            registry=registry,
        )
        self._failing_until_s: dict[str, float] = {}

    @property
    def is_failing(self) -> bool:
        """Whether a task waits for its restart, or has run for less time since then than it waited."""
        now_s = trio.current_time()
        return any(now_s < until_s for until_s in self._failing_until_s.values())

    def while_serving(self, app: QuartTrio, name: str, task: Task, *, at_end: Task | None = None) -> None:
        """Run `task` from the app's startup to its shutdown, which cancels the task and waits for it.

        Args:
            app: Must not be started yet.
            name: Name in the log and the metrics.
            task: Called again after each failure, not after it returns.
            at_end: Called once at the end, shielded from cancellation, also if the app is cancelled.
        """
        self._failures.labels(name)  # The series must exist at 0, so that an alert sees the first failure.
        # Its own scope: the app's nursery also runs the task that answers the server's lifespan messages.
        running, ended = trio.CancelScope(), trio.Event()

        async def run() -> None:
            try:
                with running:
                    await self.keep_running(name, task)
            except* Exception as error:  # noqa: BLE001 - as in keep_running
                self._note(name, error, failing_s=0.0)  # While it was being cancelled.
            finally:
                with trio.CancelScope(shield=True):
                    if at_end is not None:
                        await at_end()
                ended.set()

        @app.before_serving
        async def start() -> None:
            app.nursery.start_soon(run)

        @app.after_serving
        async def stop() -> None:
            running.cancel()
            with trio.CancelScope(shield=True):
                await ended.wait()

    async def keep_running(self, name: str, task: Task) -> None:
        """Run `task` until it returns. After a failure it is restarted; the pause doubles while it keeps failing."""
        pause_s = 0.0
        while True:
            began_s = trio.current_time()
            try:
                return await task()
            except Exception as error:  # noqa: BLE001 - whatever it was, the task has to go on
                ran_well = trio.current_time() - began_s > pause_s
                pause_s = _FIRST_PAUSE_S if ran_well or not pause_s else min(2 * pause_s, _LONGEST_PAUSE_S)
                self._note(name, error, failing_s=2 * pause_s)
            await trio.sleep(pause_s)

    @contextmanager
    def contained(self, name: str) -> Generator[None]:
        """Suppress a failure of the block, a part of task `name`, and report it like a failed task."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - as above
            if trio.current_time() < self._failing_until_s.get(name, -math.inf):
                self._failures.labels(name).inc()  # The log has one like it.
            else:
                self._note(name, error, failing_s=_LONGEST_PAUSE_S)

    def _note(self, name: str, error: Exception, *, failing_s: float) -> None:
        self._failures.labels(name).inc()
        self._failing_until_s[name] = trio.current_time() + failing_s
        logger.critical("the background task %r failed; /health shows it", name, exc_info=error)
