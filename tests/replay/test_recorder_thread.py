"""The recorder's thread: it ends whenever it is told to, and once it has failed nothing is taken for it."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from prometheus_client import Counter

from tests.core.loop import Loop
from tests.replay.tape import setup_of
from trio_llm.engine import recorder
from trio_llm.engine.recorder import Recorder
from trio_llm.params import SamplingParams, Submission
from trio_llm.replay.directory import RecordDirectory
from trio_llm.replay.encoder import Encoder
from trio_llm.replay.frames import Header

SUBMISSION = Submission((7,) * 5, SamplingParams(max_tokens=9))


def recorder_of(loop: Loop, path: Path) -> Recorder:
    """Return a recorder of a loop, which watches nothing by itself."""
    files = RecordDirectory(path, Header("0", "hash", 0.0, False, setup_of(loop)), 2**20)
    files.begin(None)
    counters = Counter("calls", "-", registry=None), Counter("bytes", "-", registry=None)
    dropped = Counter("dropped", "-", registry=None)
    encoder = Encoder(0.0, tokens=False, speculates=False)
    return Recorder(files, encoder, loop.scheduler, loop.blocks, (*counters, dropped))


def test_nothing_is_captured_once_it_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the disk was full, a step costs a count of what is dropped, not the state of the whole core."""

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RecordDirectory, "write", full)
    monkeypatch.setattr(recorder, "_GATHER_S", 0.0)
    loop = Loop()
    broken = recorder_of(loop, tmp_path)
    broken.arrived(1, SUBMISSION, 0.0)
    broken._thread.join()
    assert not broken.recording
    captured: list[object] = []
    monkeypatch.setattr(recorder, "capture", lambda *args, **_: captured.append(args))
    loop.scheduler.submit(1, SUBMISSION)
    ask = loop.scheduler.ask()
    assert ask is not None
    grant = loop.blocks.reserve(ask)
    plan = loop.scheduler.plan(grant)
    for _ in range(3):
        broken.planned(0.0, None, ask, grant, plan)
    broken.close()
    assert not captured
    assert broken._num_dropped._value.get() == 3


class _Wake(threading.Event):
    """Would wait for ever if nobody has set it."""

    def wait(self, timeout: float | None = None) -> bool:
        assert self.is_set(), "the wake-up is lost"
        return super().wait(timeout)


class _Closing(threading.Event):
    """Is set, and the thread woken, just after the thread saw that it is not."""

    def __init__(self, wake: _Wake) -> None:
        super().__init__()
        self._wake = wake

    def is_set(self) -> bool:
        seen = super().is_set()
        self.set()
        self._wake.set()
        return seen


def test_the_thread_ends_if_it_is_closed_just_before_it_waits(tmp_path: Path) -> None:
    """The wake-up of `close` is not lost between the look at whether it closes and the wait."""
    one = recorder_of(Loop(), tmp_path)
    one.close()
    one._wake = wake = _Wake()
    one._closing = _Closing(wake)
    one._run()  # Not in a thread, and on its files that are closed: there is nothing to write.
    assert not one._queue
