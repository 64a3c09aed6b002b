"""Processes for jobs that may take any time and memory: a pool of them, as the server sees it.

No job can block the event loop, hold a thread for longer than its limit, use this process's memory or end it.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trio_llm.errors import OverloadedError
from trio_llm.server.children.frames import frame, read_frame

logger = logging.getLogger(__name__)

# On a busy machine the same work takes longer by the clock.
_CLOCK_PER_CPU_SECOND = 10
# The environment of a child: neither keys nor addresses.
_PASSED_ON = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME", "TZ", "LANG", "LC_ALL")


class ChildTimeoutError(Exception):
    """The job used up its time."""


class ChildCrashError(Exception):
    """The process ended during a job for another reason than its time limit."""


class ChildKilledError(Exception):
    """Something outside, the kernel that ran out of memory for example, killed the process during a job."""


class ChildPool:
    """One process per concurrent job, started when needed; callers bound the number of jobs. Thread-safe.

    A process runs one job at a time, and is reused unless the job ended it.

    Args:
        program: The module that a process runs; it calls `jobs.run_jobs`.
        work: What a process does, in the third person, for log and errors.
    """

    def __init__(self, program: str, work: str) -> None:
        self._program, self._work = program, work
        self._idle: list[_Child] = []  # Its append and pop are atomic.

    def run(self, job: Mapping[str, Any], *, cpu_s: float, memory_bytes: int) -> dict[str, Any]:
        """Run a job and block until it is done; again, once, where something outside killed its process.

        Args:
            job: What the program takes, as JSON.
            cpu_s: CPU time it may take.
            memory_bytes: Address space it may take.

        Raises:
            ChildTimeoutError, ChildCrashError: The job ended its process; the next one gets a new process.
            OverloadedError: The machine allows no new process now, or its processes are killed.
            RecursionError, ValueError: The job cannot be written as JSON.
        """
        whole = {**job, "cpu_s": cpu_s, "memory_bytes": memory_bytes}
        try:
            return self._run(whole)
        except ChildKilledError:
            logger.warning("a process that %s was killed; its job runs again", self._work)
        try:
            return self._run(whole)
        except ChildKilledError:
            raise OverloadedError(f"The process that {self._work} was killed twice. Retry later.") from None

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
        self._idle.append(self._started())

    def close(self) -> None:
        """End the idle processes."""
        while self._idle:
            self._idle.pop().close()

    def _take(self) -> _Child:
        while True:
            try:
                child = self._idle.pop()
            except IndexError:
                return self._started()
            if child.is_alive:
                return child
            child.close()

    def _started(self) -> _Child:
        try:
            return _Child(self._program)
        except OSError as error:  # Too many processes or open files, or too little memory.
            logger.error("cannot start a process that %s: %s", self._work, error.strerror)
            raise OverloadedError(f"The server cannot start a process that {self._work}. Retry later.") from None


class _Child:
    def __init__(self, program: str) -> None:
        environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(str(Path(path).absolute()) for path in sys.path)
        self._process = subprocess.Popen(  # noqa: S603 - the same interpreter, a module of this package
            [sys.executable, "-m", program],
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
                raise ChildTimeoutError
            return read_frame(self._process.stdout)
        except (BrokenPipeError, EOFError):
            match -self._process.wait():
                case signal.SIGPROF:
                    raise ChildTimeoutError from None
                case signal.SIGKILL:  # No job can send it.
                    raise ChildKilledError from None
                case _:
                    raise ChildCrashError from None

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
