"""What a model builds itself from: named tensors of known shapes, from wherever they come.

A model's constructor asks `Weights` for every tensor by name and shape. Behind it stands a source: the files' headers
(to check and count), the files, or random numbers. Fusing, conversion, quantisation and the check for
NaN happen here, once for all families.

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
from trio_llm.model import ops
from trio_llm.model.ops import Dense, Int8, Matrix

DUMMY_STD = 0.02  # Hugging Face's initializer_range


class Source(Protocol):
    """Where tensors come from."""

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return the tensor, of exactly this shape, in any floating dtype, on any device."""
        ...


@attrs.define
class Tally:
    """Bytes of what was built so far."""

    nbytes: int = 0


@attrs.frozen
class Weights:
    """A source seen from one module of a model, in the model's dtype and on its device.

    Attributes:
        quantize: Make matrices int8, one scale per output channel.
        prefix: Put before every name.
    """

    source: Source
    dtype: torch.dtype
    device: torch.device
    quantize: bool = False
    prefix: str = ""
    tally: Tally = attrs.field(factory=Tally)

    def at(self, module: str) -> Weights:
        """Return the same weights seen from a module further down."""
        return attrs.evolve(self, prefix=f"{self.prefix}{module}.")

    def unquantized(self) -> Weights:
        """Return the same weights, to be kept in the model's dtype."""
        return attrs.evolve(self, quantize=False)

    def tensor(self, name: str, *shape: int) -> Tensor:
        """Return one tensor, in memory of its own."""
        out = torch.empty(shape, dtype=self.dtype, device=self.device)
        self._fill(out, name)
        return self._keep(out)

    def matrix(self, names: Sequence[str], outputs: Sequence[int], inputs: int, *, bias: bool = False) -> Matrix:
        """Return the linear layers `names`, of `outputs` each, fused into one matrix [sum(outputs), inputs]."""
        sizes = list(outputs)

        def fill(out: Tensor, _: int) -> None:
            for name, part in zip(names, out.split(sizes), strict=True):
                self._fill(part, f"{name}.weight")

        built = self._build(fill, 1, sum(sizes), inputs)
        bias_out = None
        if bias:
            bias_out = self._keep(torch.empty(sum(sizes), dtype=self.dtype, device=self.device))
            for name, part in zip(names, bias_out.split(sizes), strict=True):
                self._fill(part, f"{name}.bias")
        if isinstance(built, Int8):
            return Int8(built.weight[0], built.scale[0], bias_out)
        return Dense(built.weight[0], bias_out)

    def table(self, name: str, rows: int, columns: int, parts: int = 1) -> Matrix:
        """Return an embedding table [rows, columns], as [rows * parts, columns / parts]: one int8 scale per part."""

        def fill(out: Tensor, _: int) -> None:
            self._fill(out.view(rows, columns), name)

        built = self._build(fill, 1, rows * parts, columns // parts)
        return Int8(built.weight[0], built.scale[0]) if isinstance(built, Int8) else Dense(built.weight[0])

    def experts(self, names: Sequence[Sequence[str]], outputs: Sequence[int], inputs: int) -> Matrix:
        """Return [E, sum(outputs), inputs] from one list of tensor names per expert, each fused as in `matrix`."""
        sizes = list(outputs)

        def fill(out: Tensor, expert: int) -> None:
            for name, part in zip(names[expert], out.split(sizes), strict=True):
                self._fill(part, name)

        return self._build(fill, len(names), sum(sizes), inputs)

    def stacked_experts(self, name: str, num_experts: int, outputs: int, inputs: int) -> Matrix:
        """Return [E, outputs, inputs] from one tensor of that shape."""
        stacked = self._read(name, (num_experts, outputs, inputs))

        def fill(out: Tensor, expert: int) -> None:
            out.copy_(stacked[expert])
            self._check_finite(out, name)

        return self._build(fill, num_experts, outputs, inputs)

    def _build(self, fill: Callable[[Tensor, int], None], count: int, outputs: int, inputs: int) -> Matrix:
        """Fill [count, outputs, inputs] one entry at a time, so that at most one stands unquantised in memory."""
        shape = (count, outputs, inputs)
        if not self.quantize:
            weight = torch.empty(shape, dtype=self.dtype, device=self.device)
            for i in range(count):
                fill(weight[i], i)
            return Dense(self._keep(weight))
        weight = torch.empty(shape, dtype=torch.int8, device=self.device)
        scale = torch.empty(shape[:2], dtype=self.dtype, device=self.device)
        dense = torch.empty(shape[1:], dtype=self.dtype, device=self.device)
        for i in range(count):
            fill(dense, i)
            ops.quantize_rows(dense, weight[i], scale[i])
        return Int8(self._keep(weight), self._keep(scale))

    def _fill(self, out: Tensor, name: str) -> None:
        out.copy_(self._read(name, tuple(out.shape)))
        self._check_finite(out, name)

    def _read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self.source.read(self.prefix + name, shape)

    def _check_finite(self, out: Tensor, name: str) -> None:
        if out.is_meta or out.numel() == 0:
            return
        # one pass without a temporary: NaN makes both ends NaN, an infinity is one of them
        least, most = torch.aminmax(out)
        if not math.isfinite(least.item()) or not math.isfinite(most.item()):
            raise CheckpointError(f"{self.prefix}{name}: holds NaN or infinity in {self.dtype}")

    def _keep(self, tensor: Tensor) -> Tensor:
        self.tally.nbytes += tensor.nbytes
        return tensor


class RandomSource:
    """Random weights (load_format dummy): matrices from a normal distribution, norms 1, biases 0."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name.endswith("bias"):
            return torch.zeros(shape)
        if len(shape) < 2:
            return torch.ones(shape)
        return torch.empty(shape).normal_(std=DUMMY_STD, generator=self._generator)
