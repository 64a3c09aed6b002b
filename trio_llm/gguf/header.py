"""The header of GGUF files: metadata and where each tensor is, parsed with limits (no torch, no model).

GGUF files come from strangers. Every length and count is checked against the bytes that are left in the file before
anything of that size is built, so a hostile header costs one clear error, bounded time and bounded memory. Tensors are
not read here.

Source: the GGUF specification, github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from trio_llm.errors import CheckpointError

MAX_TENSORS = 200_000  # as of safetensors files
_MAX_KEYS = 10_000
_MAX_VALUES = 2_000_000  # in one array; the merges of a large vocabulary are some 500,000
_MAX_HEADER_BYTES = 512 * 2**20
_MAX_STRING_BYTES = 16 * 2**20
_MAX_DIMENSIONS = 4
_STRING, _ARRAY = 8, 9
# GGUF's value types of a fixed size, as struct spells them.
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@attrs.frozen
class GgufTensor:
    """Where one tensor is.

    Attributes:
        kind: The number of its ggml type.
        shape: As torch has it: rows first.
        offset: Of its first byte in `path`.
    """

    path: Path
    name: str
    kind: int
    shape: tuple[int, ...]
    offset: int


@attrs.frozen(eq=False)
class GgufHeader:
    """What a GGUF file, or a set of shards, says of itself. Errors name `path`."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """Return a metadata value of a kind; `default` if it is absent.

        Raises:
            CheckpointError: It is of another kind, or absent without a default.
        """
        value = self.metadata.get(key, default)
        if value is None:
            raise CheckpointError(f"{self.path}: {key} is missing")
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise CheckpointError(f"{self.path}: {key} is of another type than expected")
        return value


def is_gguf(path: Path) -> bool:
    """Say whether a path is meant as a GGUF file: it ends so."""
    return path.suffix == ".gguf"


def read_gguf(path: Path) -> GgufHeader:
    """Read the header of a file, and of the other shards where it is the first of several.

    Raises:
        CheckpointError: The file is missing or damaged; one line.
    """
    first = _read(path)
    count = first.metadata.get("split.count", 0)
    if count in (0, 1):
        return first
    tensors = dict(first.tensors)
    for shard in _other_shards(path, count):
        for name, tensor in _read(shard).tensors.items():
            if name in tensors:
                raise CheckpointError(f"{shard}: tensor {name} is in two shards")
            tensors[name] = tensor
    return attrs.evolve(first, tensors=tensors)


def _other_shards(path: Path, count: Any) -> list[Path]:
    match = _SHARD.fullmatch(path.name)
    if match is None or not isinstance(count, int) or int(match["count"]) != count:
        raise CheckpointError(f"{path}: one of {count} shards; expected a name like {path.stem}-00001-of-0000N.gguf")
    if int(match["number"]) != 1:
        raise CheckpointError(f"{path}: a shard; name the first one, {match['stem']}-00001-of-{match['count']}.gguf")
    names = [f"{match['stem']}-{number:05}-of-{match['count']}.gguf" for number in range(2, count + 1)]
    for name in names:
        if not (path.parent / name).is_file():
            raise CheckpointError(f"{path.parent / name}: no such file; it is a shard of {path.name}")
    return [path.parent / name for name in names]


def _read(path: Path) -> GgufHeader:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Parser(path, data).header()
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise CheckpointError(f"{path}: not a GGUF file: {error}") from None


class _Parser:
    """Reads forward through one file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self._at = path, data, 0

    def header(self) -> GgufHeader:
        if self._take(4) != b"GGUF":
            raise self._error("the file does not begin with GGUF")
        version = self._scalar("<I")
        if version not in (2, 3):
            raise self._error(f"GGUF version {version}; 2 and 3 are supported (big-endian files are not)")
        num_tensors, num_keys = self._scalar("<Q"), self._scalar("<Q")
        if num_tensors > MAX_TENSORS or num_keys > _MAX_KEYS:
            raise self._error(f"{num_tensors} tensors and {num_keys} keys; at most {MAX_TENSORS} and {_MAX_KEYS}")
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._string()
            if key in metadata:
                raise self._error(f"{key[:80]!r} occurs twice")
            metadata[key] = self._value(self._scalar("<I"))
        infos = [self._tensor_info() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 2**20:
            raise self._error(f"general.alignment = {alignment!r}: must be from 1 to {2**20}")
        begin = -(-self._at // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, kind, shape, offset in infos:
            if name in tensors:
                raise self._error(f"tensor {name[:80]!r} occurs twice")
            if begin + offset > len(self._data):
                raise self._error(f"tensor {name[:80]!r} begins behind the end of the file")
            tensors[name] = GgufTensor(self._path, name, kind, shape, begin + offset)
        return GgufHeader(self._path, metadata, tensors)

    def _tensor_info(self) -> tuple[str, int, tuple[int, ...], int]:
        name = self._string()
        num_dimensions = self._scalar("<I")
        if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
            raise self._error(f"tensor {name[:80]!r} has {num_dimensions} dimensions")
        shape = tuple(self._scalar("<Q") for _ in range(num_dimensions))
        if not all(1 <= size < 2**31 for size in shape):
            raise self._error(f"tensor {name[:80]!r} has the shape {shape}")
        return name, self._scalar("<I"), shape[::-1], self._scalar("<Q")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array()
        if kind not in _SCALARS:
            raise self._error(f"a value of the unknown type {kind}")
        return self._scalar(_SCALARS[kind])

    def _array(self) -> list[Any]:
        kind, count = self._scalar("<I"), self._scalar("<Q")
        if kind == _STRING:
            # Each string takes the eight bytes of its length at least.
            if count > min(_MAX_VALUES, self._left // 8):
                raise self._error(f"an array of {count} strings")
            return [self._string() for _ in range(count)]
        if kind not in _SCALARS:  # Arrays of arrays are allowed by the format, and written by nothing we know.
            raise self._error(f"an array of the type {kind}")
        spelled = _SCALARS[kind]
        if count > min(_MAX_VALUES, self._left // struct.calcsize(spelled)):
            raise self._error(f"an array of {count} values")
        return [value for (value,) in struct.iter_unpack(spelled, self._take(count * struct.calcsize(spelled)))]

    def _string(self) -> str:
        length = self._scalar("<Q")
        if length > min(_MAX_STRING_BYTES, self._left):
            raise self._error(f"a string of {length} bytes")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError:
            raise self._error("a string that is not UTF-8") from None

    def _scalar(self, spelled: str) -> Any:
        return struct.unpack(spelled, self._take(struct.calcsize(spelled)))[0]

    @property
    def _left(self) -> int:
        return len(self._data) - self._at

    def _take(self, count: int) -> bytes:
        if count > self._left:
            raise self._error("the file is cut short")
        self._at += count
        if self._at > _MAX_HEADER_BYTES:
            raise self._error(f"a header of more than {_MAX_HEADER_BYTES} bytes")
        return self._data[self._at - count : self._at]

    def _error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: not a valid GGUF file: {what}, at byte {self._at}")
