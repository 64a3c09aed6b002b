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
import torch
from numpy.typing import NDArray
from torch import Tensor

from trio_llm.config import EngineConfig
from trio_llm.errors import CheckpointError, EngineDeadError
from trio_llm.model.parallel.group import Group, RanksError
from trio_llm.model.parallel.messages import (
    Channel,
    Command,
    Connect,
    Decodes,
    Failed,
    Forward,
    Load,
    Loaded,
    Logits,
    Measured,
    Report,
    Start,
)
from trio_llm.model.parallel.silence import Mark, Silence

_PACKAGE_ROOT = Path(__file__).parents[3]
# Seconds between signs that loading goes on, for whoever wants to cancel it.
_TICK_S = 0.2
# Seconds between looks whether ranks on GPUs are silent.
_LOOK_S = 1.0
# Seconds that a rank has to die after a collective has failed because of it, and to end when it is told. Guesses.
_LAST_WORDS_S, _END_S = 2.0, 10.0
# Files in memory for ranks to come: nothing of them is left, whatever becomes of this process. They are never closed.
# Torch looks up a file's name again when it frees connections, which may be long after, in a garbage collection. A file
# in memory has none, so it stops there; what has got the descriptor's number since then, it writes to, or it aborts.
_meetings: list[int] = []


@attrs.define(eq=False)
class _Rank:
    """A process, the socket to it, and its last report if it failed."""

    number: int
    process: subprocess.Popen[bytes]
    channel: Channel[Report]
    failed: Failed | None = None
    _reading: threading.Lock = attrs.field(factory=threading.Lock, init=False)

    def __str__(self) -> str:
        return f"Rank {self.number} (process {self.process.pid})"

    def is_stopped(self) -> bool:
        """Return whether a signal or a debugger has stopped the process."""
        with suppress(OSError):
            state = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0]
            return state in ("T", "t")
        return False

    def receive(self) -> Report | None:
        """Wait for the next report, None if the rank has ended; keep its last one. Any thread may call this."""
        with self._reading:
            return self._receive()

    def take_report(self) -> None:
        """Keep the last report of a rank that has ended or is ending; waits for no rank that is alive and silent."""
        if not self._reading.acquire(timeout=_LAST_WORDS_S):
            return  # Rank 0 waits for it.
        try:
            while self.failed is None and _readable([self.channel.fileno()], 0):
                if self._receive() is None:
                    return
        finally:
            self._reading.release()

    def _receive(self) -> Report | None:
        report = self.channel.receive()
        if isinstance(report, Failed):
            self.failed = report
        return report


class Ranks:
    """Ranks 1 and up of a group, each a process on this machine.

    Only one thread sends commands; `failure` may be called on any.
    """

    def __init__(
        self, group: Group, timeout_s: float, device: torch.device, mark: Callable[[], Mark] | None = None
    ) -> None:
        """Begin without processes.

        Args:
            timeout_s: Seconds of silence after which a rank counts as hung.
            device: That of rank 0.
            mark: On GPUs, returns the end of rank 0's queue. None on a CPU.
        """
        self._group, self._timeout_s, self._device = group, timeout_s, device
        self._silence = None if mark is None else Silence(mark, timeout_s)
        self._watcher: threading.Thread | None = None
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._ranks: list[_Rank] = []
        self._ended = select.epoll()
        self._pidfds: list[int] = []
        self._meeting_fd = _meetings.pop() if _meetings else os.memfd_create("trio-llm-ranks")
        self._lock = threading.Lock()
        self._failure: EngineDeadError | None = None

    @property
    def pids(self) -> list[int]:
        return [rank.process.pid for rank in self._ranks]

    def spawn(self, config: EngineConfig, *, as_stored: bool) -> None:
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
                rank.channel.send(Load(config, number, self._meeting_place, as_stored))

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

    def connect(self, tick: Callable[[int], None]) -> None:
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
        on_gpu = self._silence is not None
        if on_gpu:
            self._watcher = threading.Thread(target=self._watch, name="trio-llm-ranks", daemon=True)
            self._watcher.start()
        with self.together():
            self._send(Connect())
            self._group.connect(self._meeting_place, self._timeout_s, self._device, on_gpu=on_gpu, look=self._look)

    def _look(self) -> None:
        if _readable([self._ended.fileno()], 0):
            raise RanksError("a rank ended before it connected")

    def _hear(self, loading: dict[int, _Rank], fd: int) -> None:
        rank = loading[fd]
        report = rank.receive()
        if isinstance(report, Loaded):
            del loading[fd]
        elif isinstance(report, Failed) or report is None:
            if report is not None and report.kind == CheckpointError.__name__:
                raise CheckpointError(report.text)
            raise self.failure(RanksError("a rank ended while loading"))

    def measured(self) -> list[Measured]:
        """Wait for what the other ranks have measured on their GPUs.

        Raises:
            EngineDeadError: A rank failed.
        """
        with self.together():
            return [self._measured(rank) for rank in self._ranks]

    def _measured(self, rank: _Rank) -> Measured:
        report = rank.receive()
        if isinstance(report, Measured):
            return report
        raise RanksError("a rank ended while it measured steps")

    def start(self, command: Start) -> None:
        """Let the other ranks allocate their pools; then they record decodes as this one does.

        Raises:
            EngineDeadError: A rank has died.
        """
        with self.together():
            self._send(command)

    @contextmanager
    def together(self) -> Generator[None]:
        """Do what all ranks do at the same time.

        Raises:
            EngineDeadError: The block raised, or a rank does not take part. No step can run again.
        """
        try:
            self.begin_turn()
            yield
            if self._silence is not None:
                self._silence.end()
        except Exception as error:
            raise self.failure(error) from error

    def begin_turn(self) -> None:
        """Count from now on how long ranks are silent."""
        if self._silence is not None:
            self._silence.begin()

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
            rows.astype(np.int64, copy=False).tobytes(), starts.tobytes(), counts.tobytes(), _bytes(additions)
        )  # fmt: skip
        with self._doing(command, token_ids):
            yield

    @contextmanager
    def decodes(self, decodes: Tensor, additions: Sequence[NDArray[Any]]) -> Generator[None]:
        """Let the other ranks replay their graph of tokens [3, B], as the block does: see `Decodes`.

        Raises:
            EngineDeadError: As `forward`.
        """
        with self._doing(Decodes(decodes.shape[1], _bytes(additions)), decodes):
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
        with self.together():
            self._send(command)
            self._group.broadcast(x)
            yield

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
                self._group.disconnect()
            return self._failure

    def check(self) -> None:
        """Raise if no step can run again: what a GPU has computed is worth nothing then.

        Raises:
            EngineDeadError: A rank failed.
        """
        if self._failure is not None:
            raise self._failure

    def _watch(self) -> None:
        """On GPUs, find out that a rank has ended or is silent: rank 0 may wait for its GPU meanwhile."""
        assert self._silence is not None
        while not (readable := _readable([self._ended.fileno(), self._stop_fd], _LOOK_S)):
            if self._silence.is_too_long():
                self.failure(RanksError(f"no answer in {self._timeout_s:g} s"))
                return
        if self._stop_fd not in readable:
            self.failure()

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
        if self._watcher is not None:
            os.eventfd_write(self._stop_fd, 1)
            self._watcher.join()
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
        for fd in (*self._pidfds, self._stop_fd):
            os.close(fd)
        if self._group.wait_disconnected(max(0.0, deadline_s - time.monotonic())):
            os.ftruncate(self._meeting_fd, 0)
            _meetings.append(self._meeting_fd)


def _bytes(columns: Sequence[NDArray[Any]]) -> list[bytes]:
    return [column.tobytes() for column in columns]


def _readable(fds: Sequence[int], timeout_s: float) -> list[int]:
    """Wait until one of them can be read, or has been closed; unlike select's, their numbers have no limit."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return [fd for fd, _ in poll.poll(timeout_s * 1000)]
