"""schemathesis over the published schema: whatever it makes up, valid or not, is no failure of the server's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import trio

from tests.server.helpers import running
from tests.server.stub import StubRunner, open_stub
from trio_llm.config import Config, ServerConfig
from trio_llm.server.app import create_app

PROGRAM = Path(sys.executable).with_name("st")
# What is refused for reasons that a schema cannot tell, such as a prompt that is too long, is no fault.
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


@pytest.mark.slow
@pytest.mark.skipif(not PROGRAM.exists(), reason="schemathesis is not installed (pip install '.[dev]')")
async def test_no_request_makes_the_server_fail(tmp_path: Path) -> None:
    """Requests of all modes, shapes and methods are answered as the schema says, and never by a 5xx."""
    config = Config(server=ServerConfig(data_dir=str(tmp_path), enable_shutdown=False))
    async with open_stub(StubRunner()) as engine, running(create_app(engine, config)) as server:
        url = f"http://127.0.0.1:{server.port}/openapi.json"
        command = [str(PROGRAM), "run", url, "--mode", "all", "--checks", CHECKS, "--max-examples", "3", "--seed", "1"]
        command += ["--max-time", "25", "--generation-database", "none", "--exclude-path", "/v1/engine/live"]
        ended = await trio.run_process(
            command, capture_stdout=True, stderr=subprocess.STDOUT, check=False, cwd=tmp_path
        )
    assert ended.returncode == 0, ended.stdout.decode()
