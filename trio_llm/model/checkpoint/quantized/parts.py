"""The stored tensors that make one quantised matrix, and what a format makes of them.

Shapes and types are checked here, from the headers, so that widening meets only values that can be wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import attrs
from torch import Tensor

from trio_llm.errors import CheckpointError
from trio_llm.model.checkpoint.tensors import FLOATS, TensorInfo
from trio_llm.model.ops.seam import Blocks

WORDS = ("I32",)
INDEXES = ("I32", "I64")
SCALES = (*FLOATS, "F8_E8M0")


@attrs.frozen
class Scheme:
    """How one quantised matrix is stored.

    Attributes:
        name: What the log and errors call the format.
        shape: [outputs, inputs].
        widen, keep, template: As in QuantizedInfo.
    """

    name: str
    shape: tuple[int, int]
    widen: Callable[[Mapping[str, Tensor]], Tensor]
    keep: Callable[[Mapping[str, Tensor]], Blocks] | None = None
    template: Callable[[], Blocks] | None = None


@attrs.frozen
class Parts:
    """Headers of the tensors that make one matrix, by their last names. All errors name the tensor.

    Attributes:
        module: What comes before the last name.
        read: Reads a tensor's values.
    """

    module: str
    infos: Mapping[str, TensorInfo]
    read: Callable[[TensorInfo], Tensor]

    def __contains__(self, name: str) -> bool:
        return name in self.infos

    def dtype(self, name: str) -> str:
        return self.infos[name].dtype

    def values(self, name: str) -> Tensor:
        """Read a short tensor."""
        return self.read(self.infos[name])

    def matrix(self, name: str, dtypes: tuple[str, ...]) -> tuple[int, int]:
        """Return the shape of a matrix that is stored in one of `dtypes`."""
        shape = self.stored(name, dtypes).shape
        if len(shape) != 2 or 0 in shape:
            raise self.error(name, f"has the shape {list(shape)}; expected a matrix")
        return shape[0], shape[1]

    def check(self, name: str, dtypes: tuple[str, ...], *shapes: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a tensor that is stored in one of `dtypes` and has one of `shapes`."""
        shape = self.stored(name, dtypes).shape
        if shape not in shapes:
            expected = " or ".join(str(list(each)) for each in shapes)
            raise self.error(name, f"has the shape {list(shape)}; expected {expected}")
        return shape

    def stored(self, name: str, dtypes: tuple[str, ...]) -> TensorInfo:
        """Return the header of a tensor that is stored in one of `dtypes`."""
        if (info := self.infos.get(name)) is None:
            raise self.error(name, "is missing")
        if info.dtype not in dtypes:
            raise self.error(name, f"is stored as {info.dtype}; expected {' or '.join(dtypes)}")
        return info

    def error(self, name: str, problem: str) -> CheckpointError:
        path = next(iter(self.infos.values())).path
        return CheckpointError(f"{path}: {self.module}.{name} {problem}")


class Format(Protocol):
    """A way to store a matrix in several tensors.

    Attributes:
        primary: The last name of the tensor that every matrix in this format has. It is not stored in a floating type.
        others: The last names of the other tensors of a matrix, some of them optional.
    """

    @property
    def primary(self) -> str: ...

    @property
    def others(self) -> tuple[str, ...]: ...

    def scheme(self, parts: Parts) -> Scheme:
        """Check the headers. Raises CheckpointError or UnsupportedError, naming the tensor."""
        ...
