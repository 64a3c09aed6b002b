"""The whole server when a rank dies: what clients and probes are told before it ends."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
from contextlib import closing
from typing import Any

import pytest

from tests.parallel.test_faults import SERVE, children, command_line

SERVE_PATIENTLY = """
import sys
from trio_llm.__main__ import main
from trio_llm.engine import supervisor

supervisor.LAST_WORDS_S = 5.0  # time to ask before the process ends
sys.argv = ["trio-llm", "serve", *sys.argv[1:]]
main()
"""


@pytest.mark.slow
def test_the_server_is_unhealthy_once_a_rank_has_died() -> None:
    """Over HTTP: the open stream ends with an error, /health and /ready are 503, a request is too; then exit code 1."""
    command = [sys.executable, "-c", SERVE_PATIENTLY, *SERVE[4:]]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            url = next(match[1] for line in server.stdout if (match := re.search(r"served on http://(\S+)\.", line)))
            (rank,) = (int(pid) for pid in children(server.pid) if "trio_llm.model.rank" in command_line(pid))
            assert ask(url, "GET", "/health") == (200, {"status": "ok"})
            body = {"prompt": "a", "max_tokens": 1500, "ignore_eos": True, "stream": True}
            with closing(http.client.HTTPConnection(url, timeout=60)) as connection:
                connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
                stream = connection.getresponse()
                assert stream.readline().startswith(b"data: ")
                os.kill(rank, 9)
                assert b'"code":"engine_dead"' in stream.read()
            assert ask(url, "GET", "/health") == (503, {"status": "dead"})
            assert ask(url, "GET", "/ready")[0] == 503
            assert ask(url, "POST", "/v1/completions", {"prompt": "a"})[0] == 503
            errors = server.communicate(timeout=60)[1]
        finally:
            server.kill()
    assert server.returncode == 1, errors
    assert f"Rank 1 (process {rank}) was ended by SIGKILL" in errors


def ask(url: str, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
    """Ask on a connection of its own; return the status and the answer."""
    with closing(http.client.HTTPConnection(url, timeout=60)) as connection:
        connection.request(method, path, json.dumps(body) if body else None, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
