"""`trio-llm serve` as users run it: a process of its own, on a free port."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import attrs


class RefusedError(Exception):
    """A request was not answered: its status and the body."""


@attrs.frozen
class ServerProcess:
    """A server that listens."""

    url: str

    def ask(self, path: str, **body: Any) -> dict[str, Any]:
        """Send a request and return its answer."""
        return json.loads(self._post(path, body))

    def ask_together(self, path: str, bodies: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Send requests at once, each from a client of its own; return their answers."""
        with ThreadPoolExecutor(len(bodies)) as clients:
            return list(clients.map(lambda body: self.ask(path, **body), bodies))

    def stream(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """Send a request and return the chunks of its stream, which ends as it should."""
        *events, done, end = self._post(path, {**body, "stream": True}).decode().split("\n\n")
        assert (done, end) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]

    def metric(self, name: str) -> float:
        """Return a series without labels but the model's name."""
        with urllib.request.urlopen(f"{self.url}/metrics") as response:
            (found,) = re.findall(rf"^{name}(?:{{.*}})? (\S+)$", response.read().decode(), re.MULTILINE)
        return float(found)

    def _post(self, path: str, body: dict[str, Any]) -> bytes:
        data, kind = json.dumps(body).encode(), {"Content-Type": "application/json"}
        try:
            with urllib.request.urlopen(urllib.request.Request(f"{self.url}{path}", data, kind)) as response:
                return response.read()
        except HTTPError as error:
            with error:
                raise RefusedError(error.code, error.read().decode()) from None


@contextmanager
def serving(*arguments: str) -> Iterator[ServerProcess]:
    """Start a server that only this machine reaches, and end it by SIGTERM, to which it must answer with code 0."""
    command = [sys.executable, "-m", "trio_llm", "serve", "--host", "127.0.0.1", "--port", "0", *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    options: dict[str, Any] = {"text": True, "cwd": Path(__file__).parents[2], "env": environment}
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, **options) as process,
    ):
        assert process.stdout is not None
        found = next(filter(None, (re.search(r" is served on (http://\S+)\. ", line) for line in process.stdout)), None)
        if found is None:
            log.seek(0)
            raise AssertionError(log.read())
        try:
            yield ServerProcess(found[1])
        finally:
            process.terminate()
    assert process.returncode == 0
