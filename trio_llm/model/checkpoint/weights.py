"""Weights for a model's constructor: named tensors of known shapes from any source.

A model's constructor requests every tensor from `Weights` by name and shape. The source is the files' headers (to check
and count), the files, or random numbers. Fusing, conversion, quantisation and the check for NaN happen here, once for
all families.

With several ranks, layers request the spans of their own rank. A size instead of a span means all of a dimension.
Matrices that are left as they are stored are cut between groups.

Letters: N outputs, K inputs, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import attrs
import torch
from torch import Tensor

from trio_llm.errors import CheckpointError
from trio_llm.model.checkpoint.cut_blocks import can_be_cut, cut
from trio_llm.model.ops import seam as ops
from trio_llm.model.ops.seam import Blocks, Dense, Int8, Keeps, Matrix, SingleMatrix, Stacked, keeps_integers
from trio_llm.model.ops.torch_reference import QUANTIZE_ELEMENTS
from trio_llm.model.parallel.group import Group
from trio_llm.model.parallel.span import Span, sizes, take, whole

_QUANTIZING_BYTES = 16  # four float32 arrays
_FP8_NAN = 0x7F  # but for the sign
DUMMY_STD = 0.02  # Hugging Face's initializer_range


class Source(Protocol):
    """A source of tensors."""

    def read(self, name: str, spans: Sequence[Span]) -> Tensor:
        """Return these entries of a tensor of exactly these sizes, in any floating dtype, on any device."""
        ...

    def template(self, name: str, shape: tuple[int, ...]) -> Blocks | None:
        """Return a matrix that can be computed as stored, without its values; None for others."""
        ...

    def read_stored(self, name: str, spans: Sequence[Span]) -> Blocks:
        """Return these entries of a matrix that has a template, between its groups."""
        ...


@attrs.define
class Tally:
    """Bytes built so far.

    Attributes:
        made_of: The most that a matrix takes beside itself while it is made: what it is packed from, and parts of that.
    """

    nbytes: int = 0
    made_of: int = 0

    def add(self, nbytes: int, made_of: int) -> None:
        self.nbytes += nbytes
        self.made_of = max(self.made_of, made_of)


@attrs.frozen
class Weights:
    """A source for one module of a model, in the model's dtype and on its device.

    Attributes:
        quantize: Make matrices int8, one scale per output channel.
        exact: As in Int8.
        as_stored: Leave quantised matrices that kernels keep as they are stored, unless `quantize` is set.
        prefix: Put before every name.
        group: The ranks among which the model is split.
        keeps: Whether kernels keep a matrix.
    """

    source: Source
    dtype: torch.dtype
    device: torch.device
    quantize: bool = False
    as_stored: bool = False
    prefix: str = ""
    tally: Tally = attrs.field(factory=Tally)
    group: Group = attrs.field(factory=Group)
    exact: bool = False
    keeps: Keeps = keeps_integers

    def at(self, module: str) -> Weights:
        """Return the weights of a submodule."""
        return attrs.evolve(self, prefix=f"{self.prefix}{module}.")

    def unquantized(self) -> Weights:
        """Return the same weights without quantisation: matrices are widened, however they are stored."""
        return attrs.evolve(self, quantize=False, as_stored=False)

    def tensor(self, name: str, *shape: int) -> Tensor:
        """Return one tensor as a copy."""
        out = torch.empty(shape, dtype=self.dtype, device=self.device)
        self._fill(out, name, *map(whole, shape))
        return self._keep(out)

    def matrix(
        self, names: Sequence[str], outputs: Sequence[int | Span], inputs: int | Span, *, bias: bool = False
    ) -> Matrix:
        """Return the linear layers `names`, of `outputs` each, fused into one matrix [sum(outputs), inputs].

        Layers that are stored too differently are stacked. If the inputs are split, the products of the ranks are added
        up, so only rank 0 has a bias.
        """
        rows, columns = list(map(whole, outputs)), whole(inputs)
        found = [self._template(f"{name}.weight", span, columns) for name, span in zip(names, rows, strict=True)]
        parts: list[SingleMatrix] = []
        first = 0
        for last in range(1, len(names) + 1):
            if last < len(names) and _can_be_fused(found[first], found[last]):
                continue
            run = slice(first, last)
            make = self._plain_matrices if found[first] is None else self._stored_matrices
            parts += make(names[run], rows[run], columns, bias=bias)
            first = last
        return parts[0] if len(parts) == 1 else Stacked(tuple(parts))

    def _plain_matrices(
        self, names: Sequence[str], rows: Sequence[Span], columns: Span, *, bias: bool
    ) -> list[SingleMatrix]:
        lengths = [span.length for span in rows]

        def fill(out: Tensor, _: int, columns: Span) -> None:
            for name, part, span in zip(names, out.split(lengths), rows, strict=True):
                self._fill(part, f"{name}.weight", span, columns)

        built = self._build(fill, 1, sum(lengths), columns)
        bias_out = self._bias(names, rows, columns) if bias else None
        if isinstance(built, Int8):
            return [ops.pack(attrs.evolve(built, weight=built.weight[0], scale=built.scale[0], bias=bias_out))]
        return [ops.pack(Dense(built.weight[0], bias_out))]

    def _stored_matrices(
        self, names: Sequence[str], rows: Sequence[Span], columns: Span, *, bias: bool
    ) -> list[SingleMatrix]:
        """Return layers of one format as stored: fused, or each by itself if the orders of their inputs differ."""
        read = [self._read_stored(f"{name}.weight", span, columns) for name, span in zip(names, rows, strict=True)]
        if all(matrix.fits(read[0]) for matrix in read):
            bias_out = self._bias(names, rows, columns) if bias else None
            fused = self._keep_blocks(Blocks.fused(read), parts=len(read) > 1)
            return [ops.pack(attrs.evolve(fused, bias=bias_out))]
        return [
            ops.pack(
                self._keep_blocks(attrs.evolve(matrix, bias=self._bias([name], [span], columns) if bias else None))
            )
            for matrix, name, span in zip(read, names, rows, strict=True)
        ]

    def _bias(self, names: Sequence[str], rows: Sequence[Span], columns: Span) -> Tensor | None:
        """Return the bias; None on the ranks that leave it to rank 0."""
        lengths = [span.length for span in rows]
        bias = torch.empty(sum(lengths), dtype=self.dtype, device=self.device)
        for name, part, span in zip(names, bias.split(lengths), rows, strict=True):
            self._fill(part, f"{name}.bias", span)
        return None if columns.first else self._keep(bias)

    def table(self, name: str, rows: int | Span, columns: int, parts: int = 1) -> Dense | Int8 | Blocks:
        """Return an embedding table [rows, columns], as [rows * parts, columns / parts]: one int8 scale per part.

        The layout is for lookups; `ops.pack` converts one that is also the head to a matrix.
        """
        span, entries = whole(rows), whole(columns)
        template = self._template(name, span, entries)
        if template is not None and template.can_divide(parts):
            return self._keep_blocks(self._read_stored(name, span, entries).divided(parts))

        def fill(out: Tensor, _: int, __: Span) -> None:
            self._fill(out.view(span.length, columns), name, span, entries)

        built = self._build(fill, 1, span.length * parts, whole(columns // parts))
        if isinstance(built, Int8):
            return attrs.evolve(built, weight=built.weight[0], scale=built.scale[0])
        return Dense(built.weight[0])

    def experts(
        self, names: Sequence[Sequence[str]], outputs: Sequence[int | Span], inputs: int | Span
    ) -> SingleMatrix:
        """Return [E, sum(outputs), inputs] from one list of tensor names per expert, each fused as in `matrix`."""
        rows, columns = list(map(whole, outputs)), whole(inputs)
        lengths = [span.length for span in rows]
        found = [
            self._template(name, span, columns, is_expert=True)
            for expert in names
            for name, span in zip(expert, rows, strict=True)
        ]
        if found[0] is not None and found[0].order is None and all(_can_be_fused(found[0], each) for each in found):
            read = (
                Blocks.fused([self._read_stored(name, span, columns) for name, span in zip(expert, rows, strict=True)])
                for expert in names
            )
            return ops.pack(self._keep_blocks(Blocks.of_experts(len(names), read), parts=2 / len(names)))

        def fill(out: Tensor, expert: int, columns: Span) -> None:
            for name, part, span in zip(names[expert], out.split(lengths), rows, strict=True):
                self._fill(part, name, span, columns)

        return ops.pack(self._build(fill, len(names), sum(lengths), columns))

    def stacked_experts(self, name: str, num_experts: int, outputs: Sequence[Span], inputs: int | Span) -> SingleMatrix:
        """Return [E, sum(outputs), inputs] from one tensor: `outputs` are spans of its second dimension."""
        lengths, columns = [span.length for span in outputs], whole(inputs)
        read = whole(columns.size) if self.quantize else columns
        stacked = [self._read(name, (whole(num_experts), span, read)) for span in outputs]

        def fill(out: Tensor, expert: int, _: Span) -> None:
            for part, values in zip(out.split(lengths), stacked, strict=True):
                self._copy(part, values[expert], name)

        return ops.pack(self._build(fill, num_experts, sum(lengths), columns))

    def _build(self, fill: Callable[[Tensor, int, Span], None], count: int, outputs: int, inputs: Span) -> Dense | Int8:
        """Fill [count, outputs, inputs] one entry at a time, so that at most one is unquantised in memory.

        An int8 scale is that of all inputs, so it is the same on every rank, and the same as without ranks.
        """
        shape = (count, outputs, inputs.length)
        if not self.quantize:
            weight = torch.empty(shape, dtype=self.dtype, device=self.device)
            for i in range(count):
                fill(weight[i], i, inputs)
            return Dense(self._keep(weight))
        weight = torch.zeros(shape, dtype=torch.int8, device=self.device)
        scale = torch.empty(shape[:2], dtype=self.dtype, device=self.device)
        dense = torch.empty(outputs, inputs.size, dtype=self.dtype, device=self.device)
        for i in range(count):
            fill(dense, i, whole(inputs.size))
            quantized = weight[i] if inputs.is_whole else torch.empty_like(dense, dtype=torch.int8)
            if not dense.is_meta:  # torch would import its compiler for it: 3 s and 70 MB
                ops.quantize_rows(dense, quantized, scale[i])
            if not inputs.is_whole:
                weight[i, :, : inputs.count] = take(quantized, (whole(outputs), inputs))
        made_of = dense.nbytes + _QUANTIZING_BYTES * min(dense.numel(), QUANTIZE_ELEMENTS)
        return Int8(self._keep(weight, made_of), self._keep(scale), exact=self.exact)

    def _template(self, name: str, rows: Span, columns: Span, *, is_expert: bool = False) -> Blocks | None:
        if self.quantize or not self.as_stored:
            return None
        found = self.source.template(self.prefix + name, sizes((rows, columns)))
        if found is None or not can_be_cut(found, rows, columns):
            return None
        return found if self.keeps(cut(found, rows, columns), self.dtype, is_expert) else None

    def _read_stored(self, name: str, rows: Span, columns: Span) -> Blocks:
        matrix = self.source.read_stored(self.prefix + name, (rows, columns))
        for part in (matrix.scale, matrix.minimum, matrix.outer):
            if part is not None and part.is_floating_point():
                self._check_finite(part, name)
        numbers = matrix.weight
        if matrix.is_fp8 and not numbers.is_meta and (numbers.view(torch.uint8) & _FP8_NAN == _FP8_NAN).any():
            raise CheckpointError(f"{self.prefix}{name}: holds NaN")
        return matrix.to(self.device)

    def _keep_blocks(self, matrix: Blocks, parts: float = 0) -> Blocks:
        """Count a matrix; `parts` is how much it was fused from, of itself."""
        self.tally.add(matrix.nbytes, int(matrix.nbytes * (1 + parts)))
        return matrix

    def _fill(self, out: Tensor, name: str, *spans: Span) -> None:
        self._copy(out, self._read(name, spans), name)

    def _copy(self, out: Tensor, values: Tensor, name: str) -> None:
        """Copy values to the front of `out` and fill the rest with zeros."""
        if out.shape != values.shape:
            out.zero_()
            out = out[tuple(map(slice, values.shape))]
        out.copy_(values)
        self._check_finite(out, name)

    def _read(self, name: str, spans: Sequence[Span]) -> Tensor:
        return self.source.read(self.prefix + name, spans)

    def _check_finite(self, out: Tensor, name: str) -> None:
        if out.is_meta or out.numel() == 0:
            return
        # one pass without a temporary: NaN makes both extremes NaN, an infinity is one of them
        low, high = torch.aminmax(out)
        if not math.isfinite(low.item()) or not math.isfinite(high.item()):
            raise CheckpointError(f"{self.prefix}{name}: holds NaN or infinity in {out.dtype}")

    def _keep(self, tensor: Tensor, parts_bytes: int = 0) -> Tensor:
        self.tally.add(tensor.nbytes, tensor.nbytes + parts_bytes)
        return tensor


def _can_be_fused(first: Blocks | None, second: Blocks | None) -> bool:
    """Return whether two matrices, None if they have to be widened, can be one."""
    return first is second if first is None or second is None else first.fits(second)


class RandomSource:
    """Random weights (load_format dummy): matrices from a normal distribution, norms 1, biases 0."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def read(self, name: str, spans: Sequence[Span]) -> Tensor:
        shape = sizes(spans)
        if name.endswith("bias"):
            return take(torch.zeros(shape), spans)
        if len(shape) < 2:
            return take(torch.ones(shape), spans)
        # All of it, so that a rank's part is that of the same model.
        return take(torch.empty(shape).normal_(std=DUMMY_STD, generator=self._generator), spans)

    def template(self, name: str, shape: tuple[int, ...]) -> None:
        """Return None: no matrix is quantised."""

    def read_stored(self, name: str, spans: Sequence[Span]) -> Blocks:
        raise AssertionError(f"{name} {sizes(spans)} has no template")
