from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.model.families import make_oracle, save
from trio_llm.config import EngineConfig
from trio_llm.errors import CheckpointError
from trio_llm.model import hub
from trio_llm.model.hub import resolve_model
from trio_llm.model.loader import inspect_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """Answers what huggingface_hub asks of one repository, owner/tiny, whose files are in `root`."""

    def __init__(self, root: Path, asked: list[str], *args: object) -> None:
        self.root, self.asked = root, asked
        super().__init__(*args)  # pyright: ignore[reportArgumentType]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self, *, body: bool) -> None:
        path = self.path.split("?")[0]
        self.asked.append(path)
        resolve = f"/owner/tiny/resolve/{COMMIT}/"
        if path.startswith("/api/models/owner/tiny/tree/"):
            files = [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": file.name}
                for file in self.root.iterdir()
            ]
            self.send(json.dumps(files).encode(), body=body)
        elif path.startswith("/api/models/owner/tiny"):
            files = [{"rfilename": file.name} for file in self.root.iterdir()]
            self.send(json.dumps({"id": "owner/tiny", "sha": COMMIT, "siblings": files}).encode(), body=body)
        elif path.startswith(resolve) and (self.root / path.removeprefix(resolve)).is_file():
            self.send((self.root / path.removeprefix(resolve)).read_bytes(), body=body)
        else:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()

    def send(self, content: bytes, *, body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hash(content)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_HEAD(self) -> None:
        self.answer(body=False)


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Serve owner/tiny on this machine, point huggingface_hub at it, and return the paths it asks for."""
    from huggingface_hub import constants

    root = save(make_oracle("qwen2"), tmp_path / "served")
    (root / "pytorch_model.bin").write_bytes(b"a pickle")
    asked: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, root, asked))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_hub_id_is_downloaded_and_loaded(asked: list[str]) -> None:
    """A hub id is fetched from HF_ENDPOINT, without pickles, and what arrives passes every check of a checkpoint."""
    directory = resolve_model("owner/tiny")
    assert {path.name for path in directory.iterdir()} >= {"config.json", "model.safetensors"}
    assert inspect_model(EngineConfig(model="owner/tiny")).architecture == "Qwen2ForCausalLM"
    assert not any("pytorch_model" in path for path in asked)


def test_an_unknown_hub_id_is_a_typed_error(asked: list[str]) -> None:
    """A repository the hub does not have is one error that names it."""
    with pytest.raises(CheckpointError, match="owner/absent: not a directory here, and the hub says"):
        resolve_model("owner/absent")


def test_a_directory_is_never_looked_up(tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory of the same spelling as a hub id wins, and nothing is asked of the hub."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner/tiny").mkdir(parents=True)
    assert resolve_model("owner/tiny") == Path("owner/tiny")
    assert asked == []


@pytest.mark.parametrize("model", ["/no/such/place", "no-slash", "a/b/c", "../x", "owner/..", ""])
def test_what_is_neither_is_refused(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a directory nor shaped like a hub id: refused without asking anybody."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="not a directory, nor a hub id"):
        resolve_model(model)


def test_without_huggingface_hub_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub is optional; a hub id without it is an error with the command."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="pip install huggingface_hub"):
        resolve_model("owner/tiny")


def test_the_default_is_the_models_directory_then_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With no model named, the seed's path is served where it exists, else the model that ships with the package."""
    monkeypatch.setattr(hub, "DEFAULT_DIRECTORY", tmp_path)
    assert resolve_model(None) == tmp_path
    monkeypatch.setattr(hub, "DEFAULT_DIRECTORY", tmp_path / "absent")
    from trio_llm.demo import demo_model_path

    assert resolve_model(None) == demo_model_path()
