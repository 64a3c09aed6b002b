"""The small files of a model's directory: whatever stands in their place, one line says so and nothing waits."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from trio_llm.errors import CheckpointError
from trio_llm.model_files import MAX_TOKENIZER_BYTES, read_text
from trio_llm.tokenizer import Tokenizer


def _sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, MAX_TOKENIZER_BYTES + 1)


def _link_out(path: Path) -> None:
    path.symlink_to(Path(__file__))


PLACES: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe": (os.mkfifo, "not a regular file"),
    "directory": (Path.mkdir, "not a regular file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "leads out of the model directory"),
    "link out": (_link_out, "leads out of the model directory"),
    "loop": (lambda path: path.symlink_to(path.name), "leads nowhere"),
    "dangling": (lambda path: path.symlink_to("nothing"), "no such file"),
    "huge": (_sparse, "more than the"),
    "binary": (lambda path: path.write_bytes(b"\xff\xfe"), "not UTF-8"),
}
FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.json", "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
)  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_sane_file_is_refused_in_one_line(tmp_path: Path, name: str, place: str) -> None:
    """A pipe, a device, a link to elsewhere or a huge file in the place of any file is an error that names it."""
    directory = tmp_path / "model"
    (directory / "additional_chat_templates").mkdir(parents=True)
    if name != "tokenizer.json":
        (directory / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {}, "merges": []}}')
    if name.startswith("additional"):
        (directory / "chat_template.jinja").write_text("x")
    make, reason = PLACES[place]
    make(directory / name)
    with pytest.raises(CheckpointError, match=reason) as caught:
        Tokenizer.from_directory(directory)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_a_hub_cache_links_to_its_own_blobs(tmp_path: Path) -> None:
    """The hub's cache keeps files as links from a snapshot to blobs; links within a directory are fine too."""
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "123").write_text("x")
    (snapshot / "a.txt").symlink_to("../../blobs/123")
    (snapshot / "b.txt").symlink_to("a.txt")
    assert read_text(snapshot, "a.txt", 10) == read_text(snapshot, "b.txt", 10) == "x"
