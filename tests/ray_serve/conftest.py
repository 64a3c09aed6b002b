from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs
import pytest

from tests.ray_serve.gate import GATE

ROOT = Path(__file__).parents[2]
DEPLOYED = {
    "num_replicas": 2,
    "max_replicas": 3,
    "upscale_delay_s": 1,
    "downscale_delay_s": 1,
    "config": {"engine": {"cpu_threads": 1, "max_batch_size": 4}},
}
_END_S = 60.0


@attrs.define
class Cluster:
    """Ray with its proxy on a loopback port."""

    port: int
    gate: Path
    process: subprocess.Popen[str]
    answers: Any

    def call(self, name: str, *arguments: Any) -> Any:
        """Run a command of the driver."""
        assert self.process.stdin is not None
        print(json.dumps([name, *arguments]), file=self.process.stdin, flush=True)
        line = self.answers.readline()
        assert line, "the driver has died: its output is above"
        return json.loads(line)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Run Ray, with the demo model's replicas behind a gate; at the end, nothing of it is left."""
    pytest.importorskip("ray", reason="needs trio-llm[ray]")
    before = _shared_memory()
    # Not pytest's own directory: the paths of Ray's sockets would be too long.
    with tempfile.TemporaryDirectory(prefix="ray-") as directory:
        gate = Path(directory, "gate")
        gate.touch()
        port, process, answers = _start(Path(directory), gate)
        try:
            cluster = Cluster(port, gate, process, answers)
            cluster.call("deploy", DEPLOYED)
            yield cluster
        finally:
            process.stdin.close()
            left = _processes(gate)
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
            answers.close()  # A test that failed may still read: it has met the end by now.
    assert not left
    assert _shared_memory() <= before
    assert process.returncode == 0


def _start(directory: Path, gate: Path) -> tuple[int, Any, Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    read, write = os.pipe()
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "XDG_"))},
        GATE: str(gate),
        "HOME": str(directory),  # Ray writes its token there.
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "default",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "trio_llm.ray_serve.prefix_header:middlewares",
        # Seconds; ten by default.
        "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
        "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    command = f"exec {sys.executable} -m tests.ray_serve.driver {port} {directory} 3>&{write} {write}>&-"
    process = subprocess.Popen(
        ["bash", "-c", command],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        pass_fds=[write],
        text=True,
        start_new_session=True,
    )
    os.close(write)
    return port, process, os.fdopen(read, encoding="utf-8")


def _processes(gate: Path) -> list[int]:
    """Return what still runs of the cluster, once it has had a moment to end."""
    deadline_s = time.monotonic() + _END_S
    while left := [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/environ") if _has(path, gate)]:
        if time.monotonic() > deadline_s:
            return left
        threading.Event().wait(0.05)
    return []


def _shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir() if path.name.startswith(("plasma", "ray"))}


def _has(environ: Path, gate: Path) -> bool:
    try:
        return f"{GATE}={gate}".encode() in environ.read_bytes().split(b"\0")
    except OSError:
        return False
