"""End a process that hangs at its shutdown, and print the stacks of its threads."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading

EXIT_CODE = 70


class Watchdog:
    """A thread that ends the process after a timeout; Trio cannot if a task ignores cancellation."""

    def __init__(self) -> None:
        self._timer: threading.Timer | None = None

    def arm(self, timeout_s: float) -> None:
        """End the process in `timeout_s` seconds; arming again resets the time."""
        self.disarm()
        self._timer = threading.Timer(timeout_s, _end, [timeout_s])
        self._timer.daemon = True
        self._timer.start()

    def disarm(self) -> None:
        """Do not end the process: it ends by itself."""
        if self._timer is not None:
            self._timer.cancel()


def _end(timeout_s: float) -> None:
    print(f"error: still running {timeout_s:g} s after the end was due; every thread is at:", file=sys.stderr)  # noqa: T201
    faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
    sys.stderr.flush()
    os._exit(EXIT_CODE)
