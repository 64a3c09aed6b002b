"""The process of a part, as the run that started it sees it: commands in, records out, an end to what hangs."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

import attrs

from cuda_kernels.compile import SOURCES

START_S = 60.0  # to import torch beside a dozen other processes (guessed)
STACKS_S = 1.0  # for a process that is ended to write its stacks

Record = Callable[[str, dict[str, Any]], None]  # an item and its result


@attrs.define(eq=False)
class PartProcess:
    """A part's process. One thread at a time gives it a command.

    Attributes:
        gone: Why there is no process any more; None while there is one.
    """

    part: str
    gone: str | None = None
    _process: subprocess.Popen[str] = attrs.field(init=False)
    _records: queue.Queue[dict[str, Any] | None] = attrs.field(factory=queue.Queue, init=False)
    _allowance_s: float = attrs.field(default=START_S, init=False)  # on top of an item's time, until it is ready

    @classmethod
    def start(cls, part: str, options: Sequence[str], log: IO[str]) -> PartProcess:
        """Start `python -m tools.kernel_lab part`; what it prints goes to the log."""
        self = cls(part)
        self._process = subprocess.Popen(  # noqa: S603 - this very program
            [sys.executable, "-m", "tools.kernel_lab", "part", part, *options],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, cwd=SOURCES.parent,
            start_new_session=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        threading.Thread(target=self._read, daemon=True).start()
        return self

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._records.put(json.loads(line))
        self._records.put(None)

    def run(self, command: Mapping[str, Any], item_s: float, end: float, record: Record) -> None:
        """Give a command and hand on the result of each item, until all are done or the process is gone.

        Args:
            item_s: Seconds that an item may take; the process is ended where one takes longer.
            end: time.monotonic() at which it is ended anyway.
        """
        waiting = dict.fromkeys([command["phase"]])  # until it says which items there are
        current: str = command["phase"]
        if self.gone is None:
            self._send(command)
        while self.gone is None:
            try:
                said = self._records.get(timeout=min(item_s + self._allowance_s, max(0.0, end - time.monotonic())))
            except queue.Empty:
                over = time.monotonic() >= end
                late = "when the run's time was over" if over else f"within {item_s:.0f} s"
                self._end(f"{current} was not done {late}")
                waiting.pop(current, None)
                record(current, {"skipped" if over else "failure": f"not done {late}"})
                break
            if said is None:
                self._end(f"the process died in {current}")
                waiting.pop(current, None)
                record(current, {"failure": f"the process died: exit code {self._process.returncode}"})
            elif "done" in said:
                return
            elif "ready" in said:
                self._allowance_s = 0.0
            elif "items" in said:
                waiting = dict.fromkeys(said["items"])
            elif "begin" in said:
                current = said["begin"]
            elif "lost" in said:
                self._end(f"the device was lost in {current}")
            else:
                waiting = {name: None for name in waiting if name not in (said["item"], command["phase"])}
                record(said["item"], {**said["result"], "seconds": said.get("seconds")})
        for item in waiting:
            record(item, {"skipped": f"not run: {self.gone}"})

    def _send(self, command: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then the records end, which says so
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()

    def _end(self, why: str) -> None:
        self.gone = why
        self.end()

    def end(self) -> None:
        """End the process and all that it started, its stacks in the log."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGABRT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STACKS_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
