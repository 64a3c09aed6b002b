"""The small files of a model's directory, read as a stranger's: regular ones, inside the directory, of sane size.

Weights have their own reader, which follows the same rules; see `trio_llm.model.checkpoint.safetensors`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, cast

from trio_llm.errors import CheckpointError
from trio_llm.text_files import UnreadableFileError, read_text_file

MAX_JSON_BYTES = 64 << 20  # A config has kilobytes, a weight index a few megabytes; guessed generously.
MAX_TOKENIZER_BYTES = 256 << 20  # The largest known, Gemma's, has 33 MB.
MAX_TEMPLATE_BYTES = 1 << 20  # The longest known have 20 KB.


def path_in(directory: Path, name: str) -> Path:
    """Return the path of a file, links followed.

    Raises:
        CheckpointError: It leads out of the directory, other than to a blob of the same hub cache, or in circles.
    """
    # Path.resolve raises an error for a loop of links, or returns one of them, by the version of Python.
    path, root = Path(os.path.realpath(directory / name)), Path(os.path.realpath(directory))
    if path.is_symlink():
        raise CheckpointError(f"{directory / name}: a link that leads nowhere")
    is_blob = root.parent.name == "snapshots" and path.parent == root.parent.parent / "blobs"
    if root not in path.parents and not is_blob:
        raise CheckpointError(f"{directory / name}: leads out of the model directory, to {path}")
    return path


def has_file(directory: Path, name: str) -> bool:
    """Say whether there is anything of this name, be it a broken link."""
    return os.path.lexists(directory / name)


def read_text(directory: Path, name: str, max_bytes: int) -> str:
    """Read a regular UTF-8 file.

    Raises:
        CheckpointError: Names the file and what is wrong with it.
    """
    path = path_in(directory, name)
    try:
        return read_text_file(path, max_bytes)
    except UnreadableFileError as error:
        raise CheckpointError(f"{directory / name}: {error}") from None


def read_json(directory: Path, name: str, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read a JSON object. Raises CheckpointError, which names the file and what is wrong with it."""
    try:
        value = json.loads(read_text(directory, name, max_bytes))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{directory / name}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{directory / name}: expected an object, found {type(value).__name__}")
    return cast("dict[str, Any]", value)


def read_optional_json(directory: Path, name: str) -> dict[str, Any]:
    """Read a JSON object; an empty one where there is no such file."""
    return read_json(directory, name) if has_file(directory, name) else {}
