"""The loop of a process that does jobs: it reads them and writes their results. Started by `pool`.

The kernel bounds each job: SIGPROF ends the process when its CPU time is used up, and an allocation beyond the limit
fails.
"""

from __future__ import annotations

import resource
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trio_llm.server.children.frames import frame, read_frame


def run_jobs(result_of: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> None:
    """Run jobs until the other side closes the pipe."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # An ignored signal is inherited from the parent.
    # systemd sends it to every process of a service; the server still needs this one while it drains.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for limit in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):
        resource.setrlimit(limit, (0, 0))
    while True:
        try:
            job = read_frame(sys.stdin.buffer)
        except EOFError:
            return
        _limit_memory(job["memory_bytes"])
        signal.setitimer(signal.ITIMER_PROF, job["cpu_s"])
        result = result_of(job)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(frame(result))
        sys.stdout.buffer.flush()


def _limit_memory(more_bytes: int) -> None:
    """Limit the address space to `more_bytes` above the current size."""
    try:
        used_bytes = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    except OSError:  # Only Linux has it.
        return
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (used_bytes + more_bytes, hard))
