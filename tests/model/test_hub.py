from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hub import Hub, commit, open_hub
from tests.model.families import make_oracle, save
from trio_llm.config import EngineConfig
from trio_llm.errors import CheckpointError, ConfigError
from trio_llm.model.checkpoint import hub as paths
from trio_llm.model.checkpoint.hub import model_name, resolve_model
from trio_llm.model.loading.loader import inspect_model

FILES = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": bytes(range(256)) * 8}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """Serve owner/files, of FILES."""
    with open_hub(tmp_path / "cache") as hub:
        hub.add("owner/files", FILES)
        yield hub


@pytest.fixture
def asked(hub: Hub) -> list[str]:
    """Return what the hub is asked."""
    return hub.asked


def refusal(model: str, revision: str | None = None) -> str:
    """Return the one line that a model ends in."""
    with pytest.raises(CheckpointError) as caught:
        resolve_model(model, revision)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_hub_id_is_downloaded_and_loaded(hub: Hub, tmp_path: Path) -> None:
    """A hub id is fetched from HF_ENDPOINT, without pickles, and what arrives passes every check of a checkpoint."""
    root = save(make_oracle("qwen2"), tmp_path / "served")
    (root / "pytorch_model.bin").write_bytes(b"a pickle")
    (root / "consolidated.safetensors").write_bytes(b"the weights again")
    hub.add("owner/tiny", root)
    directory = resolve_model("owner/tiny")
    assert {path.name for path in directory.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors"
    }  # fmt: skip
    assert inspect_model(EngineConfig(model="owner/tiny")).architecture == "Qwen2ForCausalLM"
    assert not any("pytorch_model" in path or "consolidated" in path for path in hub.asked)
    assert model_name("owner/tiny", directory) == "owner/tiny"
    assert model_name(str(directory), directory) == commit("main")


def test_a_revision_is_a_branch_or_a_commit(hub: Hub, tmp_path: Path) -> None:
    """Each revision has a directory of its own; one of a path is refused."""
    hub.add("owner/files", {**FILES, "config.json": b'{"a": 1}'}, "v2")
    for revision, text in (("v2", '{"a": 1}'), (commit("v2"), '{"a": 1}'), ("main", "{}"), (None, "{}")):
        assert (resolve_model("owner/files", revision) / "config.json").read_text() == text
    (tmp_path / "config.json").touch()
    with pytest.raises(ConfigError, match="is for a hub id"):
        resolve_model(str(tmp_path), "v2")


REFUSALS = [
    ("/api/", 401, "GatedRepo", None, "gated: accept its conditions at {url}/owner/files, then set HF_TOKEN"),
    ("/resolve/", 401, "GatedRepo", None, "gated: accept its conditions at {url}/owner/files, then set HF_TOKEN"),
    ("/resolve/", 403, "GatedRepo", "mine", "your token may not read it: accept its conditions at {url}/owner/files"),
    ("/resolve/", 403, "", "mine", "your token may not read it"),
    ("/api/", 401, "RepoNotFound", "mine", "{url} has no such repository, or it is private: check the spelling"),
    ("/resolve/", 401, "", "mine", "the hub does not know your token: set HF_TOKEN to a valid one"),
    ("/api/", 429, "", None, "the hub limits your requests: wait some minutes"),
    ("/resolve/", 429, "", None, "the hub limits your requests: wait some minutes"),
    ("/api/", 500, "", None, "the hub answers 500: try again later"),
    ("/storage/", 503, "", None, "the hub answers 503: try again later"),
]


@pytest.mark.parametrize(("where", "status", "code", "token", "says"), REFUSALS)
def test_what_the_hub_refuses_says_what_to_do(
    where: str, status: int, code: str, token: str | None, says: str, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gated, private and missing repositories, wrong tokens, too many requests and a hub that is down are one line."""
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    hub.fault = lambda path: (status, code) if where in path else None
    assert refusal("owner/files").startswith("owner/files: " + says.format(url=hub.url))
    hub.fault = lambda path: None
    resolve_model("owner/files")
    assert hub.tokens >= {token and f"Bearer {token}"}


def test_the_hub_is_told_nothing_but_what_is_wanted(hub: Hub) -> None:
    """No telemetry: only the model's own addresses are asked for, with the versions of the library and of Python."""
    resolve_model("owner/files")
    assert all("/owner/files/" in f"{path}/" for path in hub.asked)
    (agent,) = hub.agents
    assert re.fullmatch(r"unknown/None; hf_hub/[\d.]+; python/[\d.]+", agent)


def test_what_the_hub_does_not_have_is_named(hub: Hub) -> None:
    """A repository and a revision."""
    assert "owner/absent: " in (text := refusal("owner/absent")) and "has no such repository" in text
    assert refusal("owner/files", "v9").startswith("owner/files at v9: no such revision")


def test_a_cut_connection_is_resumed(hub: Hub) -> None:
    """A download that breaks off twice goes on where it stopped, and the file is whole."""
    hub.cut = [700, 2]
    assert (resolve_model("owner/files") / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert hub.ranges == [700, 1400]


def test_a_download_that_ends_is_taken_up_by_the_next(hub: Hub) -> None:
    """A connection that stays cut is one line; the command again fetches what is not complete, and nothing else."""
    hub.fault = lambda path: (500, "") if "/storage/" in path else None
    refusal("owner/files")
    hub.fault, hub.cut = (lambda path: None), [0, 1000]
    assert "the download broke off: run it again" in refusal("owner/files")
    hub.cut = [0, 0]
    hub.asked.clear()
    assert (resolve_model("owner/files") / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert [path.rpartition("/")[2] for path in hub.asked if path.startswith("GET") and "/api/" not in path] == [
        "model.safetensors"
    ]


@pytest.mark.parametrize("how", ["offline", "no network", "down"])
def test_without_the_hub_the_cache_is_used(how: str, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_HUB_OFFLINE, no network and a hub that is down: what was fetched is served; the rest says what to do."""
    from huggingface_hub import close_session, constants

    directory = resolve_model("owner/files")
    hub.add("owner/other", FILES)
    if how == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        close_session()
        says = f"not complete in the cache ({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE is set: unset it"
    elif how == "no network":
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
        says = "not in the cache, and http://127.0.0.1:1 cannot be reached: check the network"
    else:
        hub.fault = lambda path: (503, "")
        says = "the hub answers 503: try again later"
    hub.asked.clear()
    assert resolve_model("owner/files") == directory
    assert refusal("owner/other").startswith(f"owner/other: {says}")
    assert how == "down" or hub.asked == []


def test_a_snapshot_that_lacks_files_is_not_served_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted download is not taken for a model when there is no network."""
    hub.fault = lambda path: (500, "") if "/storage/" in path else None
    refusal("owner/files")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert "cannot be reached" in refusal("owner/files")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "is full: free some space, or set HF_HOME"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "is full: free some space, or set HF_HOME"),
        (PermissionError(errno.EACCES, "Permission denied", "/cache/x"), "/cache/x cannot be written: set HF_HOME"),
    ],
)
def test_a_cache_that_cannot_be_written_is_one_line(
    error: OSError, says: str, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk and a directory of somebody else, met while a file is written."""

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.file_download.http_get", fail)
    assert says in refusal("owner/files")


GGUF_FILES = (
    "m-Q4_K_M.gguf", "m-Q4_K_S.gguf", "m-UD-Q4_K_M.gguf", "mmproj-F16.gguf", "imatrix.gguf",
    "BF16/m-BF16-00001-of-00002.gguf", "BF16/m-BF16-00002-of-00002.gguf", "config.json",
)  # fmt: skip


@pytest.mark.parametrize(
    ("tag", "files"),
    [
        ("Q4_K_S", ["m-Q4_K_S.gguf"]),
        ("q4_k_s", ["m-Q4_K_S.gguf"]),
        ("UD-Q4_K_M", ["m-UD-Q4_K_M.gguf"]),
        ("m-Q4_K_M.gguf", ["m-Q4_K_M.gguf"]),
        ("BF16", ["BF16/m-BF16-00001-of-00002.gguf", "BF16/m-BF16-00002-of-00002.gguf"]),
    ],
)
def test_a_tag_names_a_gguf_file(tag: str, files: list[str], hub: Hub) -> None:
    """owner/name:TAG fetches that file, with its other shards, and no other; it is found again without a network."""
    hub.add("owner/m-GGUF", {name: name.encode() for name in GGUF_FILES})
    path = resolve_model(f"owner/m-GGUF:{tag}")
    assert path.as_posix().endswith(f"snapshots/{commit('main')}/{files[0]}")
    assert sorted(name for name in GGUF_FILES if any(f"GET /owner/m-GGUF/resolve/{commit('main')}/{name}" == asked
        for asked in hub.asked)) == files  # fmt: skip
    hub.fault = lambda path: (503, "")
    assert resolve_model(f"owner/m-GGUF:{tag}") == path


def test_a_tag_must_name_one_file(hub: Hub) -> None:
    """No tag where there are several files, a tag of none and one of two are errors that list the files."""
    hub.add("owner/m-GGUF", dict.fromkeys(GGUF_FILES[:5], b"GGUF"))
    assert refusal("owner/m-GGUF") == (
        "owner/m-GGUF: 3 GGUF files; name one as owner/m-GGUF:TAG, a part of the file's name, like Q4_K_M: "
        "m-Q4_K_M.gguf, m-Q4_K_S.gguf, m-UD-Q4_K_M.gguf"
    )
    assert "no GGUF file of this tag" in refusal("owner/m-GGUF:Q4_K")
    assert "2 GGUF files of this tag" in refusal("owner/m-GGUF:Q4_K_M")
    hub.add("owner/one-GGUF", {"m-Q8_0.gguf": b"GGUF", "mmproj-F16.gguf": b"GGUF"})
    assert resolve_model("owner/one-GGUF").name == "m-Q8_0.gguf"


def test_a_directory_is_never_looked_up(tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory of the same spelling as a hub id wins, and nothing is asked of the hub."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner/tiny").mkdir(parents=True)
    (tmp_path / "owner/tiny/config.json").touch()
    assert resolve_model("owner/tiny") == Path("owner/tiny")
    assert asked == []


@pytest.mark.parametrize(
    "model", ["/no/such/place", "no-slash", "a/b/c", "../x", "owner/..", "", "x" * 5000, "x" * 5000 + "/y", "a\0"]
)
def test_what_is_neither_is_refused(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a directory nor shaped like a hub id: refused without asking anybody."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no such directory or GGUF file, nor a hub id"):
        resolve_model(model)


def test_what_is_no_checkpoint_is_not_fetched(hub: Hub) -> None:
    """A repository of something else is an error that lists its files."""
    hub.add("owner/notes", {"README.md": b"x"})
    assert refusal("owner/notes") == "owner/notes: not a checkpoint, it has no config.json; there are README.md"
    assert not any("/resolve/" in path for path in hub.asked)


def test_the_default_is_the_models_directory_then_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With no model named, the seed's path is served where it exists, else the model that ships with the package."""
    monkeypatch.setattr(paths, "DEFAULT_DIRECTORY", tmp_path)
    assert resolve_model(None) == tmp_path
    monkeypatch.setattr(paths, "DEFAULT_DIRECTORY", tmp_path / "absent")
    from trio_llm.demo import demo_model_path

    assert resolve_model(None) == demo_model_path()


def test_a_path_that_looks_like_a_hub_id_is_not_looked_up(
    tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the first part is a directory a path is meant: the error says what that directory holds; no network."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/llama-2").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"^models/llama: not a directory; models/ holds llama-2$"):
        resolve_model("models/llama")
    assert asked == []


def test_gguf_files_are_models(tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A GGUF file, and a directory with one, are models; a missing file is an error."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dir").mkdir()
    for path in ("model-q4.gguf", "dir/model-q4.gguf"):
        (tmp_path / path).touch()
    assert resolve_model("model-q4.gguf") == Path("model-q4.gguf")
    assert resolve_model("dir") == Path("dir/model-q4.gguf")
    with pytest.raises(CheckpointError, match=r"^dir/absent\.gguf: no such file$"):
        resolve_model("dir/absent.gguf")
    assert asked == []


@pytest.mark.parametrize(
    ("files", "model", "says"),
    [
        (["d/notes.txt"], "d", "d: not a checkpoint, it has no config.json; expected config.json, tokenizer.json"),
        (["d/llama/config.json"], "d", "did you mean d/llama?"),
        (["d/snapshots/0123/config.json", "d/refs/main"], "d", "did you mean d/snapshots/0123?"),
        (["model.safetensors"], "model.safetensors", "neither a directory nor a .gguf file; a model directory"),
    ],
)
def test_what_holds_no_checkpoint_says_what_is_expected(
    files: list[str], model: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory without a checkpoint, one above it, and a single file are told apart."""
    monkeypatch.chdir(tmp_path)
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError) as caught:
        resolve_model(model)
    assert says in str(caught.value)
