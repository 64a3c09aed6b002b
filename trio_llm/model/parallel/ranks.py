"""The other ranks of a model, as rank 0 sees them: processes that it starts, commands, watches and ends.

A rank ends when its end of the socket is closed, and when rank 0's process dies, however that happens. If one of them
dies or hangs, no step can run again: `failure` finds out why, and ends the others.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from trio_llm.config import EngineConfig
from trio_llm.errors import CheckpointError, EngineDeadError
from trio_llm.model.parallel.group import Group, RanksError
from trio_llm.model.parallel.messages import (
    Channel,
    Command,
    Failed,
    Forward,
    Load,
    Loaded,
    Logits,
    Report,
    Start,
)

_PACKAGE_ROOT = Path(__file__).parents[3]
# Seconds between signs that loading goes on, for whoever wants to cancel it.
_TICK_S = 0.2
# Seconds that a rank has to die after a collective has failed because of it, and to end when it is told. Guesses.
_LAST_WORDS_S, _END_S = 2.0, 10.0


@attrs.define(eq=False)
class _Rank:
    """A process, the socket to it, and its last report if it failed."""

    number: int
    process: subprocess.Popen[bytes]
    channel: Channel[Report]
    failed: Failed | None = None

    def __str__(self) -> str:
        return f"Rank {self.number} (process {self.process.pid})"

    def is_stopped(self) -> bool:
        """Return whether a signal or a debugger has stopped the process."""
        with suppress(OSError):
            state = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0]
            return state in ("T", "t")
        return False

    def take_report(self) -> None:
        """Keep the last report of a rank that has ended or is ending; waits for no rank that is alive and silent."""
        while self.failed is None and _readable([self.channel.fileno()], 0):
            report = self.channel.receive()
            if report is None:
                return
            if isinstance(report, Failed):
                self.failed = report


class Ranks:
    """Ranks 1 and up of a group, each a process on this machine.

    Only one thread sends commands; `failure` may be called on any.
    """

    def __init__(self, group: Group, timeout_s: float) -> None:
        """Begin without processes.

        Args:
            timeout_s: Seconds of silence after which a rank counts as hung.
        """
        self._group, self._timeout_s = group, timeout_s
        self._ranks: list[_Rank] = []
        self._ended = select.epoll()
        self._pidfds: list[int] = []
        # A file in memory: nothing of it is left, whatever becomes of this process.
        self._meeting_fd = os.memfd_create("trio-llm-ranks")
        self._lock = threading.Lock()
        self._failure: EngineDeadError | None = None

    @property
    def pids(self) -> list[int]:
        return [rank.process.pid for rank in self._ranks]

    def spawn(self, config: EngineConfig) -> None:
        """Start the processes and let them load; `config` names the model by its path."""
        for number in range(1, self._group.size):
            ours, theirs = socket.socketpair()
            ours.settimeout(self._timeout_s)
            with theirs:
                process = self._process(theirs.fileno())
            rank = _Rank(number, process, Channel(ours, Report))
            self._ranks.append(rank)
            self._pidfds.append(os.pidfd_open(process.pid))
            self._ended.register(self._pidfds[-1], select.EPOLLIN)
            with suppress(OSError):  # It has died already: `connect` says of what.
                rank.channel.send(Load(config, number, self._meeting_place))

    @property
    def _meeting_place(self) -> str:
        return f"/proc/self/fd/{self._meeting_fd}"

    def _process(self, socket_fd: int) -> subprocess.Popen[bytes]:
        path = os.pathsep.join(filter(None, [str(_PACKAGE_ROOT), os.environ.get("PYTHONPATH")]))
        return subprocess.Popen(  # noqa: S603 - the same interpreter, a module of this package
            # -P: not from the current folder, which is anybody's.
            [sys.executable, "-P", "-m", "trio_llm.model.rank", str(socket_fd), str(os.getpid())],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=2,  # This process may write its answer to its own.
            pass_fds=(socket_fd, self._meeting_fd),
            process_group=0,  # Ctrl+C is for rank 0, which ends the others.
        )

    def connect(self, start: Start, tick: Callable[[int], None]) -> None:
        """Wait until all ranks have loaded, then connect them.

        Args:
            tick: Called several times a second with the number of ranks that have loaded. It may raise.
        Raises:
            CheckpointError: A rank's part of the weights is damaged.
            EngineDeadError: A rank died, or was silent for too long.
        """
        loading = {rank.channel.fileno(): rank for rank in self._ranks}
        heard_s = time.monotonic()
        while loading:
            tick(len(self._ranks) - len(loading))
            readable = _readable(list(loading), _TICK_S)
            if readable:
                heard_s = time.monotonic()
            elif time.monotonic() - heard_s > self._timeout_s:
                raise self.failure(RanksError(f"no sign of loading in {self._timeout_s:g} s"))
            for fd in readable:
                self._hear(loading, fd)
        try:
            self._send(start)
            self._group.connect(self._meeting_place, self._timeout_s)
        except (OSError, RanksError) as error:
            raise self.failure(error) from error

    def _hear(self, loading: dict[int, _Rank], fd: int) -> None:
        rank = loading[fd]
        report = rank.channel.receive()
        if isinstance(report, Loaded):
            del loading[fd]
        elif isinstance(report, Failed) or report is None:
            rank.failed = report
            if report is not None and report.kind == CheckpointError.__name__:
                raise CheckpointError(report.text)
            raise self.failure(RanksError("a rank ended while loading"))

    @contextmanager
    def forward(
        self, rows: NDArray[Any], starts: NDArray[Any], counts: NDArray[Any], additions: Sequence[NDArray[Any]],
        token_ids: Tensor,
    ) -> Generator[None]:  # fmt: skip
        """Let the other ranks run the layers as the block does, over the same batch: see `Forward`.

        Raises:
            EngineDeadError: The block raised, or a rank does not take part. No step can run again.
        """
        command = Forward(
            rows.astype(np.int64, copy=False).tobytes(), starts.tobytes(), counts.tobytes(),
            [column.tobytes() for column in additions],
        )  # fmt: skip
        with self._doing(command, token_ids):
            yield

    @contextmanager
    def logits(self, hidden: Tensor) -> Generator[None]:
        """Let the other ranks compute their parts of the logits, as the block does its own.

        Raises:
            EngineDeadError: As `forward`.
        """
        with self._doing(Logits(len(hidden)), hidden):
            yield

    @contextmanager
    def _doing(self, command: Command, x: Tensor) -> Generator[None]:
        try:
            self._send(command)
            self._group.broadcast(x)
            yield
        except Exception as error:
            raise self.failure(error) from error

    def _send(self, command: Command) -> None:
        for rank in self._ranks:
            rank.channel.send(command)

    def fileno(self) -> int:
        """Return a file descriptor that is readable once a rank has ended."""
        return self._ended.fileno()

    def failure(self, error: Exception | None = None) -> EngineDeadError:
        """Return why no step can run again, the same every time, and end all ranks.

        Args:
            error: What rank 0 noticed; None if it noticed only that a process ended.
        """
        with self._lock:
            if self._failure is None:
                self._failure = EngineDeadError(self._cause(error))
                self.kill()
            return self._failure

    def _cause(self, error: Exception | None) -> str:
        """Name the rank that failed first: the others then fail too, as their collectives do."""
        if error is not None and not isinstance(error, RanksError | OSError):
            return f"Rank 0 failed: {type(error).__name__}: {error}"
        with suppress(InterruptedError):
            self._ended.poll(_LAST_WORDS_S)
        for rank in self._ranks:
            rank.take_report()
        if found := next((rank for rank in self._ranks if rank.failed and not rank.failed.by_others), None):
            assert found.failed is not None
            return f"{found} failed: {found.failed.kind}: {found.failed.text}"
        codes = {rank.number: rank.process.poll() for rank in self._ranks}
        for rank in self._ranks:
            code = codes[rank.number]
            if code is not None and rank.failed is None:
                how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                return f"{rank} {how}."
        for rank in self._ranks:
            if rank.is_stopped():
                return f"{rank} is stopped: it did not answer for {self._timeout_s:g} s."
        return f"The other ranks do not answer: {error}."

    def kill(self) -> None:
        """End the processes at once."""
        for rank in self._ranks:
            rank.process.kill()

    def close(self) -> None:
        """End the processes: those that do not end by themselves are killed."""
        self._group.disconnect()
        for rank in self._ranks:
            rank.channel.close()
        deadline_s = time.monotonic() + _END_S
        for rank in self._ranks:
            try:
                rank.process.wait(max(0.0, deadline_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                rank.process.kill()
                rank.process.wait()
        self._ended.close()
        for fd in (*self._pidfds, self._meeting_fd):
            os.close(fd)


def _readable(fds: Sequence[int], timeout_s: float) -> list[int]:
    """Wait until one of them can be read, or has been closed; unlike select's, their numbers have no limit."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return [fd for fd, _ in poll.poll(timeout_s * 1000)]
