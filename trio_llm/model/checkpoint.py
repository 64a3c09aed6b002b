"""Safetensors checkpoints: which tensor is in which file, checked before any is read.

Files come from strangers: names in the index are held inside the directory, headers are parsed with limits, and nothing
is ever unpickled or imported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self

import attrs
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trio_llm.errors import CheckpointError
from trio_llm.messages import Progress
from trio_llm.model.config import read_json

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_TENSORS = 200_000  # far above any published model; as many take safetensors 6 s to open
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
WEIGHT_DTYPES = ("BF16", "F16", "F32")
DTYPE_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
# the other towers of multimodal checkpoints, by what their tensors begin with
OTHER_TOWERS = re.compile(
    r"^(?:model\.)?(vision_tower|vision_model|visual|audio_tower|audio_model|embed_vision|embed_audio"
    r"|multi_modal_projector)\."
)
# where wrappers keep the language model -> what it is called without one
TEXT_PREFIXES = (("model.language_model.", "model."), ("language_model.model.", "model."), ("language_model.", ""))
MAX_LISTED = 20


@attrs.frozen
class TensorInfo:
    """Where a tensor is. `stored_name` is its name in the file."""

    path: Path
    stored_name: str
    dtype: str
    shape: tuple[int, ...]


@attrs.frozen
class Checkpoint:
    """The tensors of the language model, by the names models ask for.

    Attributes:
        skipped: Other towers' prefixes -> how many tensors were left out.
    """

    directory: Path
    tensors: dict[str, TensorInfo]
    skipped: dict[str, int]


def open_checkpoint(directory: Path, *, multimodal: bool) -> Checkpoint:
    """Read all headers.

    Args:
        multimodal: The config is a wrapper's: take the language model out of it, skip other towers by name.
    Raises:
        CheckpointError: A file that is missing, not safetensors, outside the directory or at odds with the index.
    """
    tensors: dict[str, TensorInfo] = {}
    skipped: dict[str, int] = {}
    for stored in _stored_tensors(directory):
        name = stored.stored_name
        if multimodal:
            if tower := OTHER_TOWERS.match(name):
                skipped[tower[1]] = skipped.get(tower[1], 0) + 1
                continue
            name = _text_name(name)
        if name in tensors:
            raise CheckpointError(f"{directory}: tensor {name} is stored twice")
        tensors[name] = stored
    return Checkpoint(directory, tensors, skipped)


def _text_name(name: str) -> str:
    for prefix, plain in TEXT_PREFIXES:
        if name.startswith(prefix):
            return plain + name.removeprefix(prefix)
    return name


def _stored_tensors(directory: Path) -> Iterable[TensorInfo]:
    weight_map = _read_index(directory)
    names = sorted(set(weight_map.values())) if weight_map is not None else [_single_file(directory)]
    found: dict[str, TensorInfo] = {}
    for name in names:
        for info in read_header(_inside(directory, name)):
            if info.stored_name in found:
                raise CheckpointError(f"{directory}: tensor {info.stored_name} is in two shards")
            if weight_map is not None and weight_map.get(info.stored_name) != name:
                raise CheckpointError(f"{directory}: tensor {info.stored_name} of {name} is not so in {INDEX_NAME}")
            found[info.stored_name] = info
    absent = sorted((weight_map or {}).keys() - found.keys())
    if absent:
        raise CheckpointError(f"{directory}: in {INDEX_NAME} but in no file: {listed(absent)}")
    if len(found) > MAX_TENSORS:
        raise CheckpointError(f"{directory}: {len(found)} tensors, more than {MAX_TENSORS}")
    return found.values()


def _read_index(directory: Path) -> dict[str, str] | None:
    path = directory / INDEX_NAME
    if not path.exists():
        return None
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map is missing or empty")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(r"[\w][\w.-]*\.safetensors", file):
            raise CheckpointError(f"{path}: weight_map[{name!r}] = {file!r}: expected a plain .safetensors file name")
    return weight_map


def _single_file(directory: Path) -> str:
    if (directory / SINGLE_NAME).exists():
        return SINGLE_NAME
    names = sorted(path.name for path in directory.glob("*.safetensors"))
    if len(names) == 1:
        return names[0]
    found = f"{len(names)} safetensors files and no {INDEX_NAME}" if names else "no safetensors file"
    raise CheckpointError(f"{directory}: {found}; pickled weights (.bin, .pt) are never loaded")


def _inside(directory: Path, name: str) -> Path:
    """Return the file's path; it must be a regular file in the directory, or a blob of the same hub cache."""
    path = (directory / name).resolve()
    root = directory.resolve()
    is_blob = root.parent.name == "snapshots" and path.parent == root.parent.parent / "blobs"
    if path.parent != root and not is_blob:
        raise CheckpointError(f"{directory / name}: leads out of the model directory, to {path}")
    if not path.is_file():
        raise CheckpointError(f"{directory / name}: not a regular file")
    return path


def read_header(path: Path) -> list[TensorInfo]:
    """Parse one file's header; safetensors itself checks that offsets tile the file exactly."""
    try:
        with safe_open(path, framework="pt"), path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > MAX_HEADER_BYTES:
                raise CheckpointError(f"{path}: a header of {size} bytes")
            pairs = json.loads(file.read(size), object_pairs_hook=_unique_keys)
    except (SafetensorError, ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{path}: not a valid safetensors file: {error}") from error
    return [
        TensorInfo(path, name, entry["dtype"], tuple(entry["shape"]))
        for name, entry in pairs.items()
        if name != "__metadata__"
    ]


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):  # which of two wins depends on the reader
        raise ValueError("a key occurs twice in the header")
    return result


class HeaderSource:
    """Stands in for the weights while a model is built on the meta device, and collects what does not fit.

    Without a checkpoint (random weights) everything fits.
    """

    def __init__(self, checkpoint: Checkpoint | None) -> None:
        self._tensors = checkpoint.tensors if checkpoint else None
        self.used: set[str] = set()
        self.problems: list[str] = []
        self.stored_bytes = 0

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if self._tensors is None:
            return torch.empty(shape, device="meta")
        info = self._tensors.get(name)
        self.used.add(name)
        if info is None:
            self.problems.append(f"missing {name} {list(shape)}")
        elif info.shape != shape:
            self.problems.append(f"misshapen {name}: found {list(info.shape)}, expected {list(shape)}")
        elif info.dtype not in WEIGHT_DTYPES:
            self.problems.append(f"{name} is stored as {info.dtype}; {', '.join(WEIGHT_DTYPES)} are supported")
        else:
            self.stored_bytes += DTYPE_BYTES[info.dtype] * torch.Size(shape).numel()
        return torch.empty(shape, device="meta")

    def check(self, directory: Path, is_ignored: Callable[[str], bool]) -> None:
        """Raise CheckpointError listing all that is missing, misshapen, of a strange dtype or unexpected."""
        unexpected = sorted(name for name in (self._tensors or {}).keys() - self.used if not is_ignored(name))
        problems = self.problems + [f"unexpected {name}" for name in unexpected]
        if problems:
            problem_list = listed(problems, "; ")
            raise CheckpointError(f"{directory}: {len(problems)} tensors do not fit config.json: {problem_list}")


class FileSource:
    """Reads tensors out of memory-mapped files, one at a time. A context manager that unmaps them."""

    def __init__(self, checkpoint: Checkpoint, total_bytes: int, report: Callable[[Progress], None] | None) -> None:
        self._tensors, self._report = checkpoint.tensors, report
        self._done_bytes, self._total_bytes = 0, total_bytes
        self._files: dict[Path, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.clear()

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        info = self._tensors[name]
        if info.path not in self._files:
            self._files[info.path] = safe_open(info.path, framework="pt")
        tensor = self._files[info.path].get_tensor(info.stored_name)
        if tensor.shape != shape:
            raise CheckpointError(f"{info.path}: {name} changed while it was being loaded")
        self._done_bytes += tensor.nbytes
        if self._report is not None:
            self._report(Progress("loading weights", self._done_bytes, self._total_bytes, "bytes"))
        return tensor


def listed(items: list[str], separator: str = ", ") -> str:
    """Join the first items and say how many more there are."""
    more = [f"and {len(items) - MAX_LISTED} more"] if len(items) > MAX_LISTED else []
    return separator.join(items[:MAX_LISTED] + more)
