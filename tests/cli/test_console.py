"""What the command line tells people, and what it does to a process that does not end."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from trio_llm.cli.announce import open_to_all, ready_text
from trio_llm.cli.log import configure_logging
from trio_llm.cli.watchdog import Watchdog
from trio_llm.config import AuthConfig, Config, ServerConfig
from trio_llm.errors import ConfigError
from trio_llm.model_info import ModelInfo

INFO = ModelInfo(
    name="demo",
    architecture="Qwen3ForCausalLM",
    vocab_size=1024,
    hidden_size=128,
    max_model_len=1024,
    eos_token_ids=(1,),
    kv_groups=(),
    num_kv_blocks=8,
    block_bytes=64,
    dtype="bfloat16",
    memory_table="weights 1 GiB",
)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "somewhere.example"])
def test_an_open_server_is_warned_about(host: str) -> None:
    """Listening where others can connect, without a key, is said once, with what to do about it."""
    warning = open_to_all(Config(server=ServerConfig(host=host, port=8123)))
    assert warning is not None
    assert host in warning
    assert "8123" in warning
    assert "VLLM_API_KEY" in warning


@pytest.mark.parametrize(
    "config",
    [
        Config(server=ServerConfig(host="127.0.0.1")),
        Config(server=ServerConfig(host="::1")),
        Config(server=ServerConfig(host="localhost")),
        Config(auth=AuthConfig(api_keys=("sk-1",))),
        Config(auth=AuthConfig(api_key_file="keys")),
    ],
    ids=["127.0.0.1", "::1", "localhost", "key", "key file"],
)
def test_a_closed_server_is_not_warned_about(config: Config) -> None:
    """A key or a loopback address needs no warning."""
    assert open_to_all(config) is None


def test_the_ready_text_can_be_pasted() -> None:
    """The lines that are printed at start connect to this machine, and carry the key where one is needed."""
    text = ready_text(Config(), INFO, "demo", "http://0.0.0.0:8000")
    assert text.startswith("weights 1 GiB\n")
    assert "curl http://localhost:8000/v1/chat/completions" in text
    assert "In a browser: http://localhost:8000/." in text
    assert "In a browser" not in ready_text(Config(server=ServerConfig(ui=False)), INFO, "demo", "http://0.0.0.0:8000")
    assert "Authorization" not in text
    guarded = ready_text(Config(auth=AuthConfig(api_keys=("sk-1",))), INFO, "demo", "http://[::]:8000")
    assert "curl http://localhost:8000/v1/chat/completions" in guarded
    assert '-H "Authorization: Bearer $VLLM_API_KEY"' in guarded
    assert "sk-1" not in guarded


def test_logs_are_json_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Away from a terminal every event is one JSON object, on stderr and in the file, a traceback included."""
    configure_logging("info", str(tmp_path / "logs"))
    log = logging.getLogger("trio_llm.test")
    log.debug("not this")
    try:
        raise ValueError("broken\nin two")
    except ValueError:
        log.exception("a step failed: %s", "it")
    (event,) = map(json.loads, capsys.readouterr().err.splitlines())
    (in_file,) = map(json.loads, (tmp_path / "logs/trio-llm.log").read_text().splitlines())
    assert {**event, "timestamp": None} == {**in_file, "timestamp": None}
    assert event["event"] == "a step failed: it"
    assert event["level"] == "error"
    assert event["logger"] == "trio_llm.test"
    assert "ValueError: broken" in event["exception"]


def test_a_log_directory_that_cannot_be_written_is_a_wrong_setting(tmp_path: Path) -> None:
    """A log directory that is a file is refused by the setting's name."""
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"server\.log_dir"):
        configure_logging("info", str(tmp_path / "file"))


def test_the_watchdog_ends_a_process_that_hangs() -> None:
    """A process that ignores everything is ended with code 70, after every thread's place was printed."""
    program = """
import threading
from trio_llm.cli.watchdog import Watchdog
def a_function_that_hangs():
    threading.Event().wait()
Watchdog().arm(0.01)
a_function_that_hangs()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 70
    assert "a_function_that_hangs" in done.stderr


def test_arming_again_replaces_the_deadline() -> None:
    """The last deadline counts: the earlier one is given up, so that it cannot end a process that got more time."""
    before = set(threading.enumerate())
    watchdog = Watchdog()
    watchdog.arm(3600)
    (first,) = set(threading.enumerate()) - before
    watchdog.arm(3600)
    first.join()
    (second,) = set(threading.enumerate()) - before
    watchdog.disarm()
    second.join()
