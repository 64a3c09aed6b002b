"""A server in a separate process, for benchmarks."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

import attrs
import trio

from trio_llm.cli.client import Api
from trio_llm.errors import TrioLLMError

_HOST = "127.0.0.1"
_START_TIMEOUT_S = 600.0
_STOP_TIMEOUT_S = 60.0


class BenchmarkError(TrioLLMError):
    """The server cannot be measured."""


@attrs.frozen
class Child:
    """A `trio-llm serve`; `started_s` is when, on time.perf_counter's clock."""

    port: int
    started_s: float
    process: subprocess.Popen[bytes]

    @property
    def api(self) -> Api:
        return Api(f"http://{_HOST}:{self.port}/v1")

    async def listening(self) -> None:
        """Return when it accepts a connection."""
        with trio.move_on_after(_START_TIMEOUT_S):
            while self.process.poll() is None:
                with contextlib.suppress(OSError):
                    await (await trio.open_tcp_stream(_HOST, self.port)).aclose()
                    return
                await trio.sleep(0.005)
        raise BenchmarkError("the server did not start")


@contextlib.contextmanager
def serving(flags: Sequence[str]) -> Iterator[Child]:
    """Run `trio-llm serve` with these flags on a free port; stop it with SIGTERM and require exit code 0.

    It does not use the user's files and batches. Its log is printed on failure.
    """
    port = _free_port()
    with tempfile.TemporaryFile() as log, tempfile.TemporaryDirectory(prefix="trio-llm-") as data_dir:
        own = ["--host", _HOST, "--port", str(port), "--data-dir", data_dir, "--rate-limit-requests", "0"]
        started_s = time.perf_counter()
        process = subprocess.Popen(  # noqa: S603 - this very program
            [sys.executable, "-m", "trio_llm", "serve", *own, *flags], stdout=subprocess.DEVNULL, stderr=log
        )
        try:
            yield Child(port, started_s, process)
            process.send_signal(signal.SIGTERM)
            if (code := process.wait(_STOP_TIMEOUT_S)) != 0:
                raise BenchmarkError(f"the server ended with exit code {code}")
        except BaseException:
            log.seek(0)
            sys.stderr.write(log.read().decode(errors="replace"))
            raise
        finally:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])
