"""A rank that dies, hangs or raises, at every phase: the engine ends soon, names the cause, and leaves nothing behind.

Here ranks are processes. One of them does what the test wants; see faulty_rank.py. GPUs are pretended; see gpus.py.
"""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from tests.engine.fakes import FakeTokenizer
from tests.model.families import VOCAB
from tests.parallel import gpus
from trio_llm.config import EngineConfig
from trio_llm.engine.engine import Engine
from trio_llm.engine.supervisor import run_engine
from trio_llm.errors import EngineDeadError
from trio_llm.model.load import load_runner
from trio_llm.model.parallel import ranks as ranks_module
from trio_llm.model.parallel.group import Group
from trio_llm.model.parallel.messages import Channel, Failed, Report
from trio_llm.model.parallel.ranks import Ranks, _Rank
from trio_llm.model.parallel.silence import Silence
from trio_llm.params import SamplingParams, Submission

WRITE = Submission([5, 6, 7], SamplingParams(temperature=0, max_tokens=150, ignore_eos=True))
CAUSES = {
    "kill": r"Rank 1 \(process \d+\) was ended by SIGKILL\.",
    "stop": r"Rank 1 \(process \d+\) is stopped: it did not answer for [\d.]+ s\.",
    "raise": r"Rank 1 \(process \d+\) failed: ArithmeticError: a fault of the test",
}
AT_START = {**CAUSES, "raise": r"Rank 1 \(process \d+\) ended with exit code 1\."}
# Until a rank that has stopped is noticed. Others must answer a collective within it, on a machine that is busy.
PATIENCE_S = 10.0


class Letters(FakeTokenizer):
    alphabet = "".join(map(chr, range(VOCAB)))
    vocab_size = VOCAB


@pytest.fixture
def make_faulty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that gives ranks a fault in a phase; it returns the file that triggers one in a step."""
    trigger = tmp_path / "trigger"
    popen, connect, group_connect = subprocess.Popen, Ranks.connect, Group.connect

    def patient_until_stopped(self: Ranks, tick: Callable[[int], None]) -> None:
        """Give a rank time to begin, and none once it has stopped."""

        def look(loaded: int) -> None:
            if any(rank.is_stopped() for rank in self._ranks):
                self._timeout_s = 0.5
            tick(loaded)

        connect(self, look)

    def make(fault: str, phase: str, device: str = "cpu") -> Path:
        script = Path(__file__).parent / ("faulty_rank.py" if device == "cpu" else "faulty_gpu_rank.py")

        def start(command: list[str], **options: Any) -> Any:
            words = [command[0], str(script), fault, phase, str(trigger), *command[-2:]]
            return popen(words, **{**options, "stderr": subprocess.DEVNULL})

        if device == "gpu":
            gpus.pretend(monkeypatch, [gpus.RankGpu(), gpus.RankGpu()])
            monkeypatch.setattr(ranks_module, "Silence", lambda mark, _: Silence(mark, PATIENCE_S))
        monkeypatch.setattr(subprocess, "Popen", start)
        monkeypatch.setattr(Ranks, "connect", patient_until_stopped)
        monkeypatch.setattr(
            Group,
            "connect",
            lambda self, path, _, *args, **options: group_connect(self, path, PATIENCE_S, *args, **options),
        )
        return trigger

    return make


def settings(directory: Path, **options: Any) -> EngineConfig:
    """Return settings of two ranks."""
    return EngineConfig(model=str(directory), tensor_parallel_size=2, num_kv_blocks=64, max_batch_size=4, **options)


def open_files() -> list[str]:
    """Return what this process has open: sockets, descriptors of processes, files in memory but those for ranks."""
    found: list[str] = []
    for fd in list(Path("/proc/self/fd").iterdir()):
        with suppress(FileNotFoundError):  # that of the listing itself
            if int(fd.name) in ranks_module._meetings:
                continue
            found.append(str(fd.readlink()).partition(":")[0])
    return sorted(found)


def command_line(pid: str) -> str:
    """Return what a process was started with."""
    return Path(f"/proc/{pid}/cmdline").read_text()


def children(pid: int | None = None) -> list[str]:
    """Return the processes that this one, or another, started and that are still there, or not reaped."""
    found: list[str] = []
    for thread in list(Path(f"/proc/{pid or os.getpid()}/task").iterdir()):
        with suppress(FileNotFoundError):  # It has ended: another thread has its children now.
            found += (thread / "children").read_text().split()
    return found


FREED_LATE = """
import os, sys
from trio_llm.config import EngineConfig
from trio_llm.model.load import load_runner

runner = load_runner(EngineConfig(model=sys.argv[1], tensor_parallel_size=2, num_kv_blocks=64, max_batch_size=4))
connections = runner.ranks._group._processes
assert connections is not None
meeting = runner.ranks._meeting_fd
runner.close()
for _ in range(40):
    os.open("/", os.O_RDONLY)
del connections
print(os.readlink(f"/proc/self/fd/{meeting}"))
"""


def test_connections_may_be_freed_at_any_time(checkpoint: Callable[[str], Path]) -> None:
    """Torch goes back to where the ranks met, by number: whatever has taken numbers meanwhile is left alone."""
    command = [sys.executable, "-c", FREED_LATE, str(checkpoint("llama"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("/memfd:trio-llm-ranks")


@pytest.mark.parametrize(
    ("fault", "phase", "device", "says"),
    [
        *[(fault, "start", "cpu", AT_START[fault]) for fault in CAUSES],
        *[(fault, "load", "cpu", CAUSES[fault]) for fault in CAUSES],
        ("kill", "connect", "cpu", CAUSES["kill"]),
        *[(fault, "measure", "gpu", CAUSES[fault]) for fault in CAUSES],
        *[(fault, "record", device, CAUSES[fault]) for fault in CAUSES for device in ("cpu", "gpu")],
    ],
)
def test_a_rank_that_fails_before_it_serves_ends_loading(
    checkpoint: Callable[[str], Path], make_faulty: Callable[..., Path], fault: str, phase: str, device: str, says: str
) -> None:
    """Loading raises why, and no process, socket or file of the ranks is left."""
    make_faulty(fault, phase, device)
    files, processes = open_files(), children()
    with pytest.raises(EngineDeadError, match=says) as caught:
        load_runner(settings(checkpoint("llama")))
    assert children() == processes
    assert open_files() == files
    if phase == "connect":  # It is not waited for until nobody can come any more.
        assert str(caught.value.__cause__) == "a rank ended before it connected"


def test_two_threads_may_wait_for_a_rank() -> None:
    """The watcher does not read the rest of a report that another thread has begun to read; it knows it as well."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        rank = _Rank(1, subprocess.Popen(["true"]), Channel(ours, Report))
        report = Failed("Fault", "of the test", by_others=False)
        data = msgspec.msgpack.encode(report)
        heard: list[object] = []
        threads = [threading.Thread(target=lambda: heard.append(rank.receive()), daemon=True)]
        threads[0].start()
        theirs.sendall(len(data).to_bytes(8, "little"))
        while select.select([ours], [], [], 0)[0]:
            pass  # until the first thread has read the length
        threads.append(threading.Thread(target=rank.take_report, daemon=True))
        threads[1].start()
        theirs.sendall(data)
        for thread in threads:
            thread.join(60)
        assert heard == [report] and rank.failed == report
        assert rank.process.wait(60) == 0


@pytest.mark.parametrize(("phase", "device"), [("step", "cpu"), ("drain", "cpu"), ("step", "gpu")])
@pytest.mark.parametrize("fault", CAUSES)
async def test_a_rank_that_fails_in_a_step_ends_the_engine(
    checkpoint: Callable[[str], Path], make_faulty: Callable[..., Path], fault: str, phase: str, device: str
) -> None:
    """The open request ends with an error, the engine raises the cause, health is dead, no process is left."""
    trigger = make_faulty(fault, "step", device)
    processes, engines = children(), list[Engine]()
    config = settings(checkpoint("llama"))

    async def serve() -> None:
        async with run_engine(config, partial(load_runner, config), Letters()) as engine:  # type: ignore[arg-type]
            engines.append(engine)
            async with engine.open_stream(WRITE) as stream:
                await anext(aiter(stream))
                if phase == "drain":
                    engine.drain()
                trigger.touch()
                with pytest.raises(EngineDeadError):
                    await stream.collect()

    with trio.fail_after(100), pytest.raises(EngineDeadError, match=CAUSES[fault]):
        await serve()
    assert engines[0].health().status == "dead"
    assert children() == processes


async def test_a_rank_that_dies_while_nothing_runs_ends_the_engine(checkpoint: Callable[[str], Path]) -> None:
    """It is noticed without a request, and the engine's block is cancelled."""
    config = settings(checkpoint("llama"))
    runners: list[Any] = []

    def load() -> Any:
        runners.append(load_runner(config))
        return runners[-1]

    async def serve() -> None:
        async with run_engine(config, load, Letters()):  # type: ignore[arg-type]
            os.kill(runners[0].ranks.pids[0], 9)
            await trio.sleep_forever()

    with trio.fail_after(100), pytest.raises(EngineDeadError, match=CAUSES["kill"]):
        await serve()


def test_an_exception_of_rank_0_is_not_retried(checkpoint: Callable[[str], Path]) -> None:
    """In the middle of a pass the other ranks wait in a collective: the engine ends, and rank 0 is named."""
    processes = children()
    runner = load_runner(settings(checkpoint("llama")))
    ranks = runner.ranks
    assert ranks is not None
    with pytest.raises(EngineDeadError, match="Rank 0 failed: ZeroDivisionError"), ranks.logits(_hidden()):
        _ = 1 / 0
    runner.close()
    assert children() == processes


def _hidden() -> Any:
    import torch

    return torch.zeros(1, 48)


SERVE = [sys.executable, "-m", "trio_llm", "serve", "--tensor-parallel-size", "2", "--port", "0", "--host", "127.0.0.1"]


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "number", "code"), [("rank", 9, 1), ("server", 9, -9), ("server", 15, 0)])
def test_no_process_outlives_the_server(victim: str, number: int, code: int) -> None:
    """A rank's death ends the server with exit code 1 and the cause; that of the server, however, ends the ranks."""
    with subprocess.Popen(SERVE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            assert any("is served on" in line for line in server.stdout)
            (rank,) = (int(pid) for pid in children(server.pid) if "trio_llm.model.rank" in command_line(pid))
            ended = os.pidfd_open(rank)
            os.kill(rank if victim == "rank" else server.pid, number)
            errors = server.communicate()[1]
            assert select.select([ended], [], [], 30)[0]
        finally:
            server.kill()
    os.close(ended)
    assert server.returncode == code, errors
    assert ("was ended by SIGKILL" in errors) == (victim == "rank")
