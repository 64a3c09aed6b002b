"""Processes that render chat templates, so that no template can block the event loop or use this process's memory."""

from __future__ import annotations

import atexit
import logging
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from trio_llm.errors import OverloadedError
from trio_llm.server.templates.frames import frame, read_frame

logger = logging.getLogger(__name__)

# Of CPU time; an honest template takes milliseconds. On a busy machine the same work takes longer by the clock.
_CLOCK_PER_CPU_SECOND = 10
# The environment of a child: neither keys nor addresses.
_PASSED_ON = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME", "TZ", "LANG", "LC_ALL")


class RenderTimeoutError(Exception):
    """The template used up its time."""


class RenderCrashError(Exception):
    """The process ended during a job for another reason than its time limit."""


class RenderKilledError(Exception):
    """Something outside, the kernel that ran out of memory for example, killed the process during a job."""


class RenderPool:
    """One process per concurrent job, started when needed; callers bound the number of jobs. Thread-safe.

    A process runs one job at a time, and is reused unless the job ended it.
    """

    def __init__(self) -> None:
        self._idle: list[_Child] = []  # Its append and pop are atomic.

    def run(self, job: Mapping[str, Any], *, cpu_s: float, memory_bytes: int) -> dict[str, Any]:
        """Run a job and block until it is done; again, once, where something outside killed its process.

        Args:
            job: See `child`.
            cpu_s: CPU time it may take.
            memory_bytes: Address space it may take.

        Raises:
            RenderTimeoutError, RenderCrashError: The job ended its process; the next one gets a new process.
            OverloadedError: The machine allows no new process now, or its processes are killed.
            RecursionError, ValueError: The job cannot be written as JSON.
        """
        whole = {**job, "cpu_s": cpu_s, "memory_bytes": memory_bytes}
        try:
            return self._run(whole)
        except RenderKilledError:
            logger.warning("a process that renders templates was killed; its job runs again")
        try:
            return self._run(whole)
        except RenderKilledError:
            raise OverloadedError("The process that renders the chat template was killed twice. Retry later.") from None

    def _run(self, job: Mapping[str, Any]) -> dict[str, Any]:
        child = self._take()
        try:
            result = child.run(job, job["cpu_s"] * _CLOCK_PER_CPU_SECOND)
        except BaseException:
            child.close()
            raise
        if result.get("error") == "memory":
            child.close()  # A failed allocation may have left it in any state.
        else:
            self._idle.append(child)
        return result

    def start(self) -> None:
        """Start a process for the first job, which does not wait for it to begin then.

        Raises:
            OverloadedError: The machine allows no new process now.
        """
        self._idle.append(_started())

    def close(self) -> None:
        """End the idle processes."""
        while self._idle:
            self._idle.pop().close()

    def _take(self) -> _Child:
        while True:
            try:
                child = self._idle.pop()
            except IndexError:
                return _started()
            if child.is_alive:
                return child
            child.close()


@cache
def shared_pool() -> RenderPool:
    """Return this process's shared pool."""
    pool = RenderPool()
    atexit.register(pool.close)
    return pool


def _started() -> _Child:
    try:
        return _Child()
    except OSError as error:  # Too many processes or open files, or too little memory.
        logger.error("cannot start a process that renders templates: %s", error.strerror)
        raise OverloadedError("The server cannot start a process that renders templates. Retry later.") from None


class _Child:
    def __init__(self) -> None:
        environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(str(Path(path).absolute()) for path in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "trio_llm.server.templates.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env=environment,
            start_new_session=True,  # Ctrl-C must reach only the server, which may still need this process.
        )

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def run(self, job: Mapping[str, Any], clock_s: float) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        deadline = time.monotonic() + clock_s
        try:
            self._process.stdin.write(frame(job))
            self._process.stdin.flush()
            poll = select.poll()
            poll.register(self._process.stdout, select.POLLIN)
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise RenderTimeoutError
            return read_frame(self._process.stdout)
        except (BrokenPipeError, EOFError):
            match -self._process.wait():
                case signal.SIGPROF:
                    raise RenderTimeoutError from None
                case signal.SIGKILL:  # No template can send it.
                    raise RenderKilledError from None
                case _:
                    raise RenderCrashError from None

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
