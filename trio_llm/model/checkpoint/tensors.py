"""The tensors of a checkpoint in any file format: listed and checked first, then read one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Generic, Protocol, Self, TypeVar

import attrs
import torch
from torch import Tensor

from trio_llm.errors import CheckpointError
from trio_llm.model.checkpoint.cut_blocks import cut
from trio_llm.model.ops.seam import Blocks
from trio_llm.model.parallel.span import Span, counts, share_of, sizes, take
from trio_llm.model_info import Progress

_MAX_MAPPED_BYTES = 2**24  # read of a file before it is mapped anew
MAX_TENSORS = 200_000  # far above any published model; safetensors takes 6 s to open this many
_MAX_LISTED = 20
FLOATS = ("BF16", "F16", "F32")


@attrs.frozen
class TensorInfo:
    """A tensor's place and format in a checkpoint.

    Attributes:
        stored_name: Its name in the file.
        dtype: The stored format, by its name in the files.
        nbytes: Bytes in the file.
        index: Index in the stored tensor, if several are stacked into one.
        is_readable: Whether tensors of this format can be read.
        template: Makes the matrix that is computed as stored, on the meta device; None if it has to be widened.
    """

    path: Path
    stored_name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    index: int = 0
    is_readable: bool = True
    template: Callable[[], Blocks] | None = None


@attrs.frozen(kw_only=True)
class QuantizedInfo(TensorInfo):
    """A matrix that several stored tensors make; `dtype` names the format.

    Attributes:
        parts: The stored tensors, by their last names.
        widen: Makes float32 [outputs, inputs] of the parts. Raises CheckpointError for values that do not fit together.
        keep: Makes the matrix that is computed as stored, if there is a template.
    """

    parts: Mapping[str, TensorInfo]
    widen: Callable[[Mapping[str, Tensor]], Tensor]
    keep: Callable[[Mapping[str, Tensor]], Blocks] | None


class Reader(Protocol):
    """Reads tensors of one checkpoint's files, which it keeps open until `close`."""

    def read(self, info: TensorInfo) -> Tensor:
        """Return a tensor in a floating type, in memory of its own or mapped."""
        ...

    def read_stored(self, info: TensorInfo) -> Blocks:
        """Return a matrix that has a template, as stored."""
        ...

    def close(self) -> None: ...


T = TypeVar("T")


class MappedFiles(Generic[T]):
    """Memory-mapped files, each mapped anew when much of it has been read.

    Pages that have been read count as memory of the process for as long as the file is mapped.
    """

    def __init__(self, open_file: Callable[[Path], T]) -> None:
        self._open = open_file
        self._files: dict[Path, T] = {}
        self._read_bytes: dict[Path, int] = {}

    def at(self, path: Path, nbytes: int) -> T:
        """Return a file, of which `nbytes` will be read."""
        read_bytes = self._read_bytes.get(path, _MAX_MAPPED_BYTES) + nbytes
        if read_bytes > _MAX_MAPPED_BYTES:
            self._files[path] = self._open(path)
            read_bytes = nbytes
        self._read_bytes[path] = read_bytes
        return self._files[path]

    def close(self) -> None:
        self._files.clear()
        self._read_bytes.clear()


@attrs.frozen
class Checkpoint:
    """The tensors of the language model, by the names that models request.

    Attributes:
        path: The directory or the file.
        skipped: Prefix of another tower -> number of tensors left out.
        open: Opens the files.
        scratch_bytes: The most memory that reading a tensor takes, as stored or not; without the matrix kept as stored.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    skipped: Mapping[str, int]
    open: Callable[[], Reader]
    scratch_bytes: Callable[[TensorInfo, bool], int]


class HeaderSource:
    """Replaces the weights while a model is built on the meta device, and collects mismatches.

    Without a checkpoint (random weights) there are none.

    Attributes:
        stored_bytes: Bytes of the requested tensors, by stored format.
        kept_bytes: Of these, the bytes of what is computed as stored.
        scratch_bytes: The most memory that reading one of them takes.
    """

    def __init__(self, checkpoint: Checkpoint | None) -> None:
        self._checkpoint, self._tensors = checkpoint, checkpoint.tensors if checkpoint else None
        self.used: set[str] = set()
        self.problems: dict[str, None] = {}  # each once: a tensor may be requested in parts
        self.stored_bytes: dict[str, int] = {}
        self.kept_bytes: dict[str, int] = {}
        self.scratch_bytes = 0

    def read(self, name: str, spans: Sequence[Span]) -> Tensor:
        part = torch.empty(counts(spans), device="meta")
        if self._tensors is None:
            return part
        info, shape = self._tensors.get(name), sizes(spans)
        self.used.add(name)
        if info is None:
            self._refuse(f"missing {name} {list(shape)}")
        elif info.shape != shape:
            self._refuse(f"misshapen {name}: found {list(info.shape)}, expected {list(shape)}")
        elif not info.is_readable:
            self._refuse(f"{name} is stored as {info.dtype}; {', '.join(FLOATS)} are supported")
        else:
            nbytes = share_of(info.nbytes, spans)
            self.stored_bytes[info.dtype] = self.stored_bytes.get(info.dtype, 0) + nbytes
            self._read_with_scratch(info, as_stored=False)
        return part

    def _read_with_scratch(self, info: TensorInfo, *, as_stored: bool) -> None:
        assert self._checkpoint is not None
        self.scratch_bytes = max(self.scratch_bytes, self._checkpoint.scratch_bytes(info, as_stored))

    def _refuse(self, problem: str) -> None:
        self.problems[problem] = None

    def template(self, name: str, shape: tuple[int, ...]) -> Blocks | None:
        return _template(self._tensors or {}, name, shape)

    def read_stored(self, name: str, spans: Sequence[Span]) -> Blocks:
        assert self._tensors is not None
        info = self._tensors[name]
        assert info.template is not None
        assert info.shape == sizes(spans)
        self.used.add(name)
        for counted in (self.stored_bytes, self.kept_bytes):
            counted[info.dtype] = counted.get(info.dtype, 0) + share_of(info.nbytes, spans)
        self._read_with_scratch(info, as_stored=True)
        return cut(info.template(), *spans)

    def check(self, path: Path, is_ignored: Callable[[str], bool]) -> None:
        """Raise CheckpointError listing all that is missing, misshapen, of a strange dtype or unexpected."""
        unexpected = {name for name in (self._tensors or {}).keys() - self.used if not is_ignored(name)}
        unexpected = sorted(unexpected - self._zero_biases(unexpected))
        problems = [*self.problems, *(f"unexpected {name}" for name in unexpected)]
        if problems:
            problem_list = listed(problems, "; ")
            raise CheckpointError(f"{path}: {len(problems)} tensors do not fit config.json: {problem_list}")

    def _zero_biases(self, names: set[str]) -> set[str]:
        """Return the biases that are zero: AutoGPTQ stores one with each layer that has none."""
        if self._checkpoint is None or self._tensors is None:
            return set()
        with closing(self._checkpoint.open()) as reader:
            return {
                name
                for name in names
                if name.endswith(".bias")
                and isinstance(self._tensors.get(f"{name.removesuffix('.bias')}.weight"), QuantizedInfo)
                and not reader.read(self._tensors[name]).any()
            }


class FileSource:
    """Reads a checkpoint's tensors one at a time and reports progress. A context manager that closes the files."""

    def __init__(self, checkpoint: Checkpoint, total_bytes: int, report: Callable[[Progress], None] | None) -> None:
        self._tensors, self._report = checkpoint.tensors, report
        self._done_bytes, self._total_bytes = 0, total_bytes
        self._reader = checkpoint.open()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()

    def read(self, name: str, spans: Sequence[Span]) -> Tensor:
        info = self._tensors[name]
        tensor = self._reader.read(info)
        if tensor.shape != sizes(spans):
            raise CheckpointError(f"{info.path}: {name} changed while it was being loaded")
        self._count(share_of(info.nbytes, spans))
        return take(tensor, spans)

    def template(self, name: str, shape: tuple[int, ...]) -> Blocks | None:
        return _template(self._tensors, name, shape)

    def read_stored(self, name: str, spans: Sequence[Span]) -> Blocks:
        info = self._tensors[name]
        assert info.shape == sizes(spans)
        matrix = self._reader.read_stored(info)
        self._count(share_of(info.nbytes, spans))
        return cut(matrix, *spans)

    def _count(self, nbytes: int) -> None:
        self._done_bytes += nbytes
        if self._report is not None:
            self._report(Progress("loading weights", self._done_bytes, self._total_bytes, "bytes"))


def _template(tensors: Mapping[str, TensorInfo], name: str, shape: tuple[int, ...]) -> Blocks | None:
    info = tensors.get(name)
    return info.template() if info is not None and info.template is not None and info.shape == shape else None


def listed(items: list[str], separator: str = ", ") -> str:
    """Join the first items and say how many more there are."""
    more = [f"and {len(items) - _MAX_LISTED} more"] if len(items) > _MAX_LISTED else []
    return separator.join(items[:_MAX_LISTED] + more)
