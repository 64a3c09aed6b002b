from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gguf.files import write
from tests.hub import Hub, commit, open_hub
from tests.model.families import make_oracle, save
from trio_llm.__main__ import main
from trio_llm.demo import demo_model_path

ROOT = Path(__file__).parents[2]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """Serve an empty hub."""
    with open_hub(tmp_path / "cache") as hub:
        yield hub


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs a command and returns its exit code, output and errors."""

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["trio-llm", *words])
        with pytest.raises(SystemExit) as end:
            main()
        printed = capsys.readouterr()
        return int(end.value.code or 0), printed.out, printed.err

    return run


def listing(run: Run) -> dict[str, dict[str, Any]]:
    """Return what `models --json` prints, by model."""
    code, printed, _ = run("models", "--json")
    assert code == 0
    return {entry["model"]: entry for entry in map(json.loads, printed.splitlines())}


def test_what_is_pulled_is_listed_and_can_be_served(hub: Hub, run: Run, tmp_path: Path) -> None:
    """Each model is listed with its architecture, format, bytes and path, the same path that `pull` printed."""
    hub.add("owner/demo", demo_model_path())
    oracle = make_oracle("qwen3")
    hub.add("owner/tiny-GGUF", {"tiny-F32.gguf": write(oracle, tmp_path / "tiny.gguf").read_bytes()})
    hub.add("owner/bare", save(oracle, tmp_path / "bare"))
    for name in ("owner/demo", "owner/tiny-GGUF:F32", "owner/bare"):
        code, printed, _ = run("pull", name)
        assert code == 0
        assert str(tmp_path / "cache") in printed
    found = listing(run)
    demo, tiny, bare = (found[name] for name in ("owner/demo", "owner/tiny-GGUF:tiny-F32.gguf", "owner/bare"))
    assert (demo["architecture"], demo["format"], demo["problem"]) == ("Qwen3ForCausalLM", "BF16", None)
    assert demo["nbytes"] > 2**20 and demo["revision"] == commit("main")
    assert (tiny["architecture"], tiny["format"], tiny["problem"]) == ("Qwen3ForCausalLM", "F32", None)
    assert tiny["nbytes"] == (tmp_path / "tiny.gguf").stat().st_size
    assert bare["problem"] == "no tokenizer.json"
    code, printed, _ = run("models")
    assert code == 0 and printed.count("\n") == 4 and demo["path"] in printed
    code, printed, _ = run("generate", "-m", "owner/demo", "What is the capital of Japan?")
    assert (code, "Tokyo" in printed) == (0, True)


def test_what_cannot_be_served_says_why(hub: Hub, run: Run) -> None:
    """An interrupted download, an architecture that is not here and pickled weights are listed with the reason."""
    hub.add("owner/strange", {"config.json": b'{"architectures": ["Falcon"]}', "model.safetensors": b"x" * 99})
    hub.add("owner/pickled", {"config.json": b'{"architectures": ["LlamaForCausalLM"]}', "pytorch_model.bin": b"x"})
    hub.add("owner/cut", {"config.json": b'{"architectures": ["LlamaForCausalLM"]}', "model.safetensors": b"x" * 5000})
    hub.fault = lambda path: (500, "") if "/storage/" in path else None
    assert [run("pull", f"owner/{name}")[0] for name in ("strange", "pickled", "cut")] == [0, 0, 1]
    found = {name: entry["problem"] for name, entry in listing(run).items()}
    assert "not a valid safetensors file" in found["owner/strange"]
    assert "pickled weights (.bin, .pt) are never loaded" in found["owner/pickled"]
    assert "no safetensors file" in found["owner/cut"]


def test_an_empty_cache_says_how_to_fill_it(hub: Hub, run: Run, tmp_path: Path) -> None:
    """Nothing in the cache is one line, and no JSON."""
    assert run("models")[:2] == (0, f"no models in {tmp_path / 'cache'}; `trio-llm pull OWNER/NAME` fetches one\n")
    assert listing(run) == {}


def test_patterns_choose_other_files(hub: Hub, run: Run) -> None:
    """--include fetches what it names, in the revision that is named, and nothing else."""
    files = {"config.json": b"{}", "onnx/model.onnx": b"x", "README.md": b"y"}
    hub.add("owner/many", files, "v2")
    code, printed, _ = run("pull", "owner/many", "--revision", "v2", "--include", "onnx/*", "--include", "*.md")
    assert code == 0
    directory = Path(printed.split("  ")[0])
    assert {path.relative_to(directory).as_posix() for path in directory.rglob("*.*")} == {
        "onnx/model.onnx",
        "README.md",
    }
    code, _, errors = run("pull", "owner/many", "--revision", "v2", "--include", "*.bin")
    assert code == 1
    assert last(errors) == (
        "error: owner/many at v2: no file matches *.bin; there are README.md, config.json, onnx/model.onnx"
    )


def last(errors: str) -> str:
    """Return the last line."""
    return errors.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["pull", "name"], "error: 'name': no hub id; expected owner/name, or owner/name:TAG for a GGUF file"),
        (["pull", "owner/absent"], "error: owner/absent: {url} has no such repository"),
        (["pull", "owner/m", "--revision", "x"], "error: owner/m at x: no such revision"),
        (["generate", "-m", "owner/m", "--revision", "x", "hi"], "error: owner/m at x: no such revision"),
    ],
)
def test_what_cannot_be_fetched_is_one_line(words: list[str], says: str, hub: Hub, run: Run) -> None:
    """Exit code 1 and one line on stderr, from every command that fetches."""
    hub.add("owner/m", {"config.json": b"{}"})
    code, printed, errors = run(*words)
    assert (code, printed) == (1, "")
    assert last(errors).startswith(says.format(url=hub.url))
    assert "Traceback" not in errors


def test_serve_ends_in_the_same_line(hub: Hub, tmp_path: Path) -> None:
    """The server says it as the last line of its log, exit code 1; the requests to the hub are not logged."""
    hub.add("owner/m", {"config.json": b"{}"})
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "trio_llm", "serve", "owner/m", "--revision", "x"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert last(done.stderr).startswith("error: owner/m at x: no such revision")
    assert "Traceback" not in done.stderr and "HTTP Request" not in done.stderr


def test_a_revision_of_a_path_is_refused(run: Run) -> None:
    """--revision with a directory would be ignored, so it is an error."""
    code, _, errors = run("generate", "-m", str(demo_model_path()), "--revision", "v2", "hi")
    assert code == 2
    assert "revision = 'v2': is for a hub id" in errors


def test_a_hub_id_is_the_models_name(hub: Hub) -> None:
    """A model from the hub is served under its id, not under the commit that its directory is called after."""
    from trio_llm.config import EngineConfig
    from trio_llm.model.load import load_runner

    threads = torch.get_num_threads()
    hub.add("owner/demo", demo_model_path())
    assert load_runner(EngineConfig(model="owner/demo", num_kv_blocks=8, max_model_len=64)).info.name == "owner/demo"
    torch.set_num_threads(threads)
