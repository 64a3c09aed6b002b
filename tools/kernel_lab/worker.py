"""One process of `all`: it takes commands as lines of JSON, and says a line when an item begins and one when it ends.

What a kernel does to its process, a sticky fault or a hang, it does to one part. After a failure the device is asked
whether it is lost; if so, the process ends and says so.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from cuda_kernels.launch import Dim3, Kernel, launcher, using
from tools.kernel_lab.device import Device
from tools.kernel_lab.parts import Command, Phase, Say, phases_of
from tools.kernel_lab.phases import guarded, run_item, without_nan

LOST = 3  # exit code
Trouble = Literal["fault", "hang"]


class _Troubled:
    """A launcher whose first launch goes wrong: the process dies of a fault, or nothing ever comes back."""

    def __init__(self, trouble: Trouble) -> None:
        self._trouble = trouble

    def launch(self, kernel: Kernel, grid: Dim3, block: Dim3, shared_bytes: int, args: Sequence[Any]) -> None:  # noqa: ARG002
        if self._trouble == "fault":
            os.abort()
        while True:
            signal.pause()


def main(part: str, device: Device, trouble: Trouble | None) -> int:
    """Be a part until the input ends; return the exit code.

    Args:
        trouble: Make the first launch go wrong, to rehearse what a run makes of it.
    """
    faulthandler.enable()  # who ends this process for a hang gets the stacks into the log
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what others print goes to the log

    def say(record: Mapping[str, Any]) -> None:
        lines.write(json.dumps(without_nan(dict(record)), default=str) + "\n")

    with device.session(), using(launcher() if trouble is None else _Troubled(trouble)):
        return serve(phases_of(part, device, say), device, sys.stdin, say)


def serve(phases: Mapping[str, Phase], device: Device, commands: Iterable[str], say: Say) -> int:
    """Do what each line of `commands` says; return the exit code."""
    say({"ready": True})
    for line in commands:
        command = Command(**json.loads(line))
        if not _run(phases[command.phase], command, device, say):
            return LOST
        say({"done": command.phase})
    return 0


def _run(phase: Phase, command: Command, device: Device, say: Say) -> bool:
    """Run a phase's items; return whether the device is still of use."""
    deadline = time.monotonic() + command.seconds
    items = phase(command)
    if isinstance(items, Sequence):  # else they are known as they are made
        say({"items": [name for name, _ in items]})
    for item, action in guarded(items):
        say({"begin": item})
        began = time.monotonic()
        result = {"skipped": "out of time"} if began >= deadline else run_item(action)
        if not isinstance(result, dict):
            result = {"result": result}
        say({"item": item, "result": result, "seconds": round(time.monotonic() - began, 3)})
        if "failure" in result and device.is_lost():
            say({"lost": item})
            return False
    return True
