"""A rank that dies, stops or raises where a test wants it: FAULT, PHASE and TRIGGER, then what a rank is called with.

In the phase `step` it does so in the first step that finds the file TRIGGER. Before that come `connect`, `measure` on a
GPU, and `record`.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

FAULT, PHASE, TRIGGER = sys.argv[1], sys.argv[2], Path(sys.argv[3])


def fail() -> None:
    """Do what the test wants."""
    if FAULT == "raise":
        raise ArithmeticError("a fault of the test")
    os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[FAULT])


def main() -> int:
    """Be a rank with a fault."""
    if PHASE == "start":
        fail()
    from trio_llm.model import rank
    from trio_llm.model.parallel.group import Group

    load, obey = rank.load_model, rank.Follower.obey

    def faulty_load(*args: Any) -> Any:
        fail()
        return load(*args)

    def faulty(*args: Any, **options: Any) -> Any:
        fail()

    def faulty_obey(self: rank.Follower, command: Any) -> None:
        if TRIGGER.exists():
            fail()
        obey(self, command)

    if PHASE == "load":
        rank.load_model = faulty_load
    elif PHASE == "measure":
        rank.measure_room = faulty
    elif PHASE == "connect":
        Group.connect = faulty
    elif PHASE == "record":
        rank.record_decodes = faulty
    elif PHASE == "step":
        rank.Follower.obey = faulty_obey
    return rank.main(int(sys.argv[4]), int(sys.argv[5]))


if __name__ == "__main__":
    sys.exit(main())
