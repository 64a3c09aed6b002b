"""Safetensors checkpoints: find each tensor's file, and check all headers before reading tensors.

Files are untrusted: names in the index must stay inside the directory, headers are parsed with limits, and nothing is
unpickled or imported.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from trio_llm.errors import CheckpointError
from trio_llm.model.checkpoint.quantized.grouping import group, read_formats
from trio_llm.model.checkpoint.tensors import (
    FLOATS,
    MAX_TENSORS,
    Checkpoint,
    MappedFiles,
    QuantizedInfo,
    TensorInfo,
    listed,
)
from trio_llm.model.config import ModelConfig
from trio_llm.model.ops.seam import Blocks
from trio_llm.model_files import has_file, path_in, read_json

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
# Bytes that each weight takes while a matrix is read, measured: unpacked numbers, and float32 of them and of scales.
_KEPT_SCRATCH, _WIDENED_SCRATCH = 5, 11
# name prefixes of the other towers of multimodal checkpoints
OTHER_TOWERS = re.compile(
    r"^(?:model\.)?(vision_tower|vision_model|visual|audio_tower|audio_model|embed_vision|embed_audio"
    r"|multi_modal_projector)\."
)
# prefix of the language model inside a wrapper -> prefix without one
TEXT_PREFIXES = (("model.language_model.", "model."), ("language_model.model.", "model."), ("language_model.", ""))


def open_checkpoint(directory: Path, *, multimodal: bool, quantization: ModelConfig | None = None) -> Checkpoint:
    """Read all headers.

    Args:
        multimodal: The config is a wrapper: take only the language model, skip other towers by name.
        quantization: quantization_config of a quantised checkpoint. The tensors of each matrix become one, a weight.
    Raises:
        UnsupportedError: The quantised format is not supported; names it.
        CheckpointError: A file is missing, not safetensors, outside the directory or contradicts the index.
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
    if quantization is not None:
        with closing(_Reader()) as reader:
            tensors = group(tensors, read_formats(quantization), reader.read)
    return Checkpoint(directory, tensors, skipped, _Reader, _scratch_bytes)


def _scratch_bytes(info: TensorInfo, as_stored: bool) -> int:
    """Return the most memory that reading takes: none where the file is mapped."""
    if not isinstance(info, QuantizedInfo):
        return 0
    return math.prod(info.shape) * (_KEPT_SCRATCH if as_stored else _WIDENED_SCRATCH)


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
    if not has_file(directory, INDEX_NAME):
        return None
    weight_map = read_json(directory, INDEX_NAME).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map is missing or empty")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(r"[\w][\w.-]{0,200}\.safetensors", file):
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
    path = path_in(directory, name)
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
    return [_tensor_info(path, name, entry) for name, entry in pairs.items() if name != "__metadata__"]


def _tensor_info(path: Path, name: str, entry: dict[str, Any]) -> TensorInfo:
    first, end = entry["data_offsets"]
    return TensorInfo(
        path, name, entry["dtype"], tuple(entry["shape"]), end - first, is_readable=entry["dtype"] in FLOATS
    )


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):  # readers differ in which of two values they use
        raise ValueError("a key occurs twice in the header")
    return result


class _Reader:
    """Reads tensors of memory-mapped files: plain ones as stored, quantised ones in float32 or as blocks."""

    def __init__(self) -> None:
        self._files: MappedFiles[Any] = MappedFiles(lambda path: safe_open(path, framework="pt"))

    def read(self, info: TensorInfo) -> Tensor:
        if not isinstance(info, QuantizedInfo):
            return self._stored(info)
        try:
            return info.widen(self._parts(info))
        except CheckpointError as error:
            raise CheckpointError(f"{info.path}: {info.stored_name} ({info.dtype}): {error}") from None

    def read_stored(self, info: TensorInfo) -> Blocks:
        assert isinstance(info, QuantizedInfo)
        assert info.keep is not None
        return info.keep(self._parts(info))

    def _parts(self, info: QuantizedInfo) -> dict[str, Tensor]:
        return {name: self._stored(part) for name, part in info.parts.items()}

    def _stored(self, info: TensorInfo) -> Tensor:
        return self._files.at(info.path, info.nbytes).get_tensor(info.stored_name)

    def close(self) -> None:
        self._files.close()
