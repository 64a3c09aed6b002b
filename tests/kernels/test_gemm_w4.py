"""Linear layers of 4-bit weights, held to float64 on the weights that they stand for."""

from __future__ import annotations

from typing import Any, Literal

import attrs
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cuda_kernels import gemm_w4
from cuda_kernels.launch import kernel
from tests.kernels.helpers import assert_close, count, simulate
from tools.ptx_simulator.program import parse
from trio_llm.model.ops.matrices import Blocks, Tiles
from trio_llm.model.ops.torch_reference import dequantize

Offset = Literal["eight", "zeros", "minima"]
BF16, FP16 = torch.bfloat16, torch.float16


def make(n: int, k: int, group: int, offset: Offset = "eight", scale: torch.dtype = FP16) -> Blocks:
    """Return random blocks; every number, zero point and group of a row is another one."""
    torch.manual_seed(n + k + group)
    groups = n, k // group
    return Blocks(
        torch.randint(0, 256, (n, k // 2), dtype=torch.uint8),
        (torch.rand(groups) / 50 + 0.01).to(scale),
        zero=torch.randint(0, 16, groups, dtype=torch.int8) if offset == "zeros" else None,
        minimum=(torch.randn(groups) / 10).to(scale) if offset == "minima" else None,
    )


def multiply(x: Tensor, matrix: Blocks, **options: Any) -> Tensor:
    """Return the kernel's product."""
    tiles = Tiles.of(matrix)
    return gemm_w4.linear(x, tiles.weight, tiles.scale, zeros=tiles.zero, minima=tiles.minimum, **options)


def reference(x: Tensor, matrix: Blocks, bias: Tensor | None = None) -> Tensor:
    """Multiply in float64."""
    out = x.double() @ dequantize(matrix).double().T
    return out if bias is None else out + bias.double()


def check(rows: int, matrix: Blocks, dtype: torch.dtype, *, splits: int, bias: bool = True) -> None:
    """Hold a product of strided rows to the reference."""
    n, k = len(matrix.weight), matrix.inputs
    x = torch.randn(rows, k + 8).to(dtype)[:, :k]
    own = torch.randn(n).to(dtype) if bias else None
    (out,) = simulate(lambda: (multiply(x, matrix, bias=own, splits=splits),))
    assert_close(out, reference(x, matrix, own), slack=2)


@pytest.mark.parametrize("offset", ["eight", "zeros", "minima"])
@pytest.mark.parametrize("scale", [FP16, torch.float32])
@pytest.mark.parametrize("shape", [(2, 64, 160), (1, 3, 32, 448)])
def test_tiles_hold_every_weight(shape: tuple[int, ...], offset: Offset, scale: torch.dtype) -> None:
    """What is laid out for the kernels is the same weights, in as many bytes, row by row."""
    *index, n, k = shape
    matrix = make(n, k, 32, offset, scale)
    tiles = Tiles.of(attrs.evolve(matrix, order=torch.randperm(k)))
    assert tiles.shape == (n, k)
    parts = [part for part in (tiles.weight, tiles.scale, tiles.zero, tiles.minimum) if part is not None]
    assert sum(part.nbytes for part in parts) == matrix.nbytes
    rows = torch.randint(0, n, index)
    assert torch.equal(dequantize(tiles.rows(rows)), dequantize(matrix)[rows])
    back = tiles.rows(slice(3, n))
    assert torch.equal(dequantize(back), dequantize(matrix)[3:]) and back.order is tiles.order


@pytest.mark.parametrize(
    ("rows", "n", "k", "group", "offset", "dtype", "splits"),
    [(1, 32, 128, 32, "eight", BF16, 1), (3, 160, 416, 32, "minima", FP16, 2), (9, 96, 640, 128, "zeros", BF16, 5),
     (20, 64, 192, 64, "zeros", FP16, 1), (40, 32, 480, 96, "eight", BF16, 3)],
)  # fmt: skip
def test_linear(rows: int, n: int, k: int, group: int, offset: Offset, dtype: torch.dtype, splits: int) -> None:
    """Tiles of 8 to 64 rows, outputs that fill no block, groups that end within a stage, and parts of the inputs."""
    check(rows, make(n, k, group, offset), dtype, splits=splits)


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("splits", [1, 2])
def test_gated(kind: Literal["silu", "gelu_tanh"], splits: int) -> None:
    """Gate and up are computed by the same warp; whoever has their whole sums writes act(gate) * up."""
    matrix, x = make(192, 256, 64, "zeros"), torch.randn(5, 256).bfloat16()
    bias = torch.randn(192).bfloat16()
    (out,) = simulate(lambda: (multiply(x, matrix, bias=bias, activation=kind, splits=splits),))
    gate, up = reference(x, matrix, bias).chunk(2, dim=-1)
    assert_close(out, (F.silu(gate) if kind == "silu" else F.gelu(gate, approximate="tanh")) * up, slack=2)


@pytest.mark.kernels_full
@pytest.mark.parametrize(("dtype", "scale"), [(BF16, FP16), (FP16, FP16), (BF16, torch.float32)])
@pytest.mark.parametrize("group", [32, 64, 96, 128, 384])
@pytest.mark.parametrize("offset", ["eight", "zeros", "minima"])
@pytest.mark.parametrize("rows", [1, 8, 16, 17, 70])
def test_every_format(rows: int, offset: Offset, group: int, dtype: torch.dtype, scale: torch.dtype) -> None:
    """All groups, offsets and types of scales with each tile of rows, whole and split."""
    matrix = make(160, 384, group, offset, scale)
    for splits in (1, 3):
        check(rows, matrix, dtype, splits=splits, bias=False)


def test_large_inputs_keep_their_digits() -> None:
    """Numbers enter with 16 too much, which float sums take back: even where every input is positive and large."""
    matrix, x = make(32, 512, 128), (torch.rand(2, 512) * 1000 + 1000).half()
    (out,) = simulate(lambda: (multiply(x, matrix, splits=1),), orders=(0,))
    assert_close(out, reference(x, matrix))


# Bytes of weights per warp instruction, at least: measured, less a tenth.
@pytest.mark.parametrize(("rows", "group", "least"), [(1, 128, 3.4), (16, 32, 2.4), (64, 128, 0.92)])
def test_weights_are_read_once_without_conflicts(rows: int, group: int, least: float) -> None:
    """Weights and inputs move in full sectors, no bank is asked twice, and an instruction moves many bytes."""
    matrix, x = make(256, 1024, group, "zeros"), torch.randn(rows, 1024).bfloat16()
    tiles = Tiles.of(matrix)
    counted = count(lambda: gemm_w4.linear(x, tiles.weight, tiles.scale, zeros=tiles.zero, splits=1))
    blocks = len(matrix.weight) // gemm_w4.OUTPUTS
    assert counted.sectors["cp"] * 32 == tiles.weight.nbytes + blocks * x.nbytes
    for opcode in ("ldmatrix", "ld"):
        assert counted.passes[opcode] == counted.passes_least[opcode]
    assert matrix.nbytes / counted.issued.total() > least


@pytest.mark.parametrize("gated", [0, 1])
def test_weights_are_asked_for_before_the_wait(gated: int) -> None:
    """While the kernel before runs, the weights of all stages but one are on their way, and nothing else."""
    macros = {"BM": 8, "STAGES": 4, "GATED": gated, "GELU": 0, "OFFSET": 1, "WIDE_SCALES": 0, "SPLIT": 0, "IO_FP16": 0}
    built = kernel("gemm_w4.cu", "gemm_w4", **macros).build("compute_90")
    opcodes = [(one.opcode, one.modifiers[0]) for one in parse(built.ptx, "gemm_w4").instructions if one.modifiers]
    before = opcodes[: opcodes.index(("griddepcontrol", "wait"))]
    tiles = gemm_w4.BK // 32
    assert before.count(("cp", "async")) == 3 * tiles * (1 + gated)


def test_supports_says_why_not() -> None:
    """What the kernel cannot take is named."""
    x = torch.zeros(9, 64, dtype=BF16)
    assert gemm_w4.supports(x) is None and gemm_w4.supports_gated(x, 128) is None
    assert gemm_w4.supports(x.float()) == "dtype torch.float32"
    assert gemm_w4.supports(x[:, 1:33]) == "rows that do not begin at 16 bytes"
    assert gemm_w4.supports(x.expand(300, 9, 64)[:, 0]) == "300 rows"
    assert gemm_w4.supports_gated(x, 96) == "48 gated outputs"


def test_what_tiles_cannot_hold() -> None:
    """Bytes, groups of 16, outputs that are no whole tiles and outer scales stay what they are."""
    matrix = make(64, 64, 32)
    assert Tiles.can_hold(matrix)
    for other in (
        attrs.evolve(matrix, weight=matrix.weight.view(torch.int8)),
        make(64, 64, 16),
        make(48, 64, 32),
        attrs.evolve(matrix, outer=torch.ones(64, 1, 1).half()),
    ):
        assert not Tiles.can_hold(other)
