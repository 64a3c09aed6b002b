"""Linear layers of a few rows."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cuda_kernels import gemv
from cuda_kernels.launch import kernel
from cuda_kernels.paged_attn import Device
from tests.kernels.helpers import ROUNDING, assert_close, count, simulate
from tools.ptx_simulator.program import Address, Operand, Register, Vector, parse


def make(rows: int, n: int, k: int, dtype: torch.dtype, *, int8: bool) -> dict[str, Any]:
    """Return arguments of `linear`, the input a strided view."""
    torch.manual_seed(rows + n + k)
    x = torch.randn(rows, k + 8).to(dtype)[:, :k]
    if int8:
        weight = torch.randint(-127, 128, (n, k), dtype=torch.int8)
        return {"x": x, "weight": weight, "scale": (torch.rand(n) / 100).to(dtype)}
    return {"x": x, "weight": (torch.randn(n, k) / 8).to(dtype)}


def reference(x: Tensor, weight: Tensor, scale: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Multiply in float64."""
    out = x.double() @ weight.double().T
    out = out if scale is None else out * scale.double()
    return out if bias is None else out + bias.double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(
    ("rows", "n", "k"),
    [(1, 18, 896), (2, 9, 1136), (1, 5, 4880), (2, 70, 1136), (3, 7, 272), (5, 35, 1136), (8, 16, 128)],
)
def test_linear(rows: int, n: int, k: int, dtype: torch.dtype, int8: bool) -> None:
    """Products of any shape, of 16-bit and of int8 weights, with a bias."""
    args = make(rows, n, k, dtype, int8=int8)
    bias = torch.randn(n).to(dtype)
    (out,) = simulate(lambda: (gemv.linear(**args, bias=bias),))
    assert_close(out, reference(**args, bias=bias), slack=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(
    ("rows", "n", "k", "added"), [(1, 18, 1040, True), (2, 9, 128, False), (3, 7, 272, True), (6, 20, 1040, False)]
)
def test_normalised_rows(rows: int, n: int, k: int, added: bool, dtype: torch.dtype, int8: bool) -> None:
    """The norm of a sum before the product, and the sum, which is rounded as torch rounds it; x is left as it was."""
    args = make(rows, n, k, dtype, int8=int8)
    x, residual, norm = args.pop("x"), torch.randn(rows, k).to(dtype), torch.rand(k).to(dtype)
    before = x.clone()
    given = residual if added else None
    out, total = simulate(lambda: gemv.normed_linear(x, given, norm, 1e-6, **args))
    assert torch.equal(total, x + residual if added else x) and torch.equal(x, before)
    wide = total.double()
    normed = wide * (wide.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * norm.double()
    # Rounded between norm and product, as two kernels would: the errors of a row's products add up by chance.
    assert_close(out, reference(normed, **args), slack=2, of_largest=ROUNDING[dtype])


def test_a_gated_product_of_normalised_rows() -> None:
    """Norm, product and activation in one launch."""
    args = make(2, 20, 192, torch.bfloat16, int8=False)
    x, residual, norm = args.pop("x"), torch.randn(2, 192).bfloat16(), torch.rand(192).bfloat16()
    out, total = simulate(lambda: gemv.normed_linear(x, residual, norm, 1e-6, **args, activation="silu"))
    wide = total.double()
    normed = wide * (wide.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * norm.double()
    gate, up = reference(normed, **args).chunk(2, dim=-1)
    assert_close(out, F.silu(gate) * up, slack=2, of_largest=ROUNDING[torch.bfloat16])


def test_norms_that_are_kernels_of_their_own() -> None:
    """Too many rows for every block to normalise, or strides that it does not know."""
    x, norm, weight = torch.zeros(8, 1024).bfloat16(), torch.zeros(1024).bfloat16(), torch.zeros(4, 1024).bfloat16()
    assert gemv.supports_norm(x, x, norm, weight) is None
    assert gemv.supports_norm(torch.cat((x, x), 1), None, norm, weight) == "8 rows of 2048"
    assert gemv.supports_norm(x[:1], torch.cat((x, x), 1)[:2, :1024], norm, weight) == "a strided residual"


@pytest.mark.parametrize("rows", [2, 7])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
def test_gated(kind: Literal["silu", "gelu_tanh"], int8: bool, rows: int) -> None:
    """Gate and up are computed by the same block, which writes act(gate) * up."""
    args = make(rows, 20, 192, torch.bfloat16, int8=int8)
    (out,) = simulate(lambda: (gemv.linear(**args, activation=kind),))
    gate, up = reference(**args).chunk(2, dim=-1)
    assert_close(out, (F.silu(gate) if kind == "silu" else F.gelu(gate, approximate="tanh")) * up, slack=2)


@pytest.mark.parametrize("int8", [False, True])
def test_weights_are_read_once(int8: bool) -> None:
    """Each weight is moved once, in full sectors; everything else is small beside it."""
    args = make(1, 64, 2048, torch.bfloat16, int8=int8)
    counted = count(lambda: gemv.linear(**args))
    weights, moved = args["weight"].nbytes // 32, counted.sectors["ld"]
    warps = 64 // gemv.OUTPUTS
    # x is read by every warp, in halves of sectors beside int8 weights; these reads hit the L1 cache.
    x_sectors = warps * 2048 * 2 // 32 * (2 if int8 else 1)
    assert moved == weights + x_sectors + (warps if int8 else 0)  # and a sector of scales
    # Thread instructions per weight, but for moves: PTX has 11,584 of them here, machine code for sm_90 has few.
    assert (counted.issued.total() - counted.issued["mov"]) * 32 / (64 * 2048) < 5.5


# Bytes of weights per warp instruction but for moves, which ptxas mostly leaves out: measured, less a tenth.
@pytest.mark.parametrize(
    ("rows", "int8", "dtype", "of_one_warp", "shared"),
    [
        (1, False, torch.bfloat16, 16, 13),
        (1, False, torch.float16, 10, 8.8),
        (1, True, torch.bfloat16, 6.5, 5.5),
        (1, True, torch.float16, 5.6, 4.8),
        (2, False, torch.bfloat16, 11, 9.5),
        (2, False, torch.float16, 7.1, 6.3),
        (2, True, torch.float16, 7.8, 7.8),
        (3, False, torch.bfloat16, 40, 40),
        (8, False, torch.float16, 39, 39),
        (8, True, torch.bfloat16, 7.7, 7.7),
    ],
)
def test_an_instruction_moves_many_bytes(
    rows: int, int8: bool, dtype: torch.dtype, of_one_warp: float, shared: float
) -> None:
    """At least the 4.7 that an H200's memory brings in the time of one, also where warps share a row."""
    for outputs, least in ((64, of_one_warp), (16, shared)):
        assert least >= 4.7
        args = make(rows, outputs, 8192, dtype, int8=int8)
        issued = count(lambda args=args: gemv.linear(**args)).issued
        assert args["weight"].nbytes / (issued.total() - issued["mov"]) > least


@pytest.mark.parametrize("gated", [0, 1])
@pytest.mark.parametrize("int8", [0, 1])
@pytest.mark.parametrize(("rows", "shared"), [(1, 0), (1, 1), (8, 0)])
def test_weights_are_asked_for_long_before_their_use(rows: int, shared: int, int8: int, gated: int) -> None:
    """Of each lane 128 bytes are on their way before anything waits for the first of them, and one row's rest."""
    macros = {"M": rows, "SHARED": shared, "INT8": int8, "GATED": gated, "GELU": 0, "NORM": 0, "IO_FP16": 0}
    waiting: list[set[str]] = []
    most = 0
    for instruction in parse(kernel("gemv.cu", "gemv", **macros).build("compute_90").ptx, "gemv").instructions:
        if instruction.opcode == "ld" and "L1__no_allocate" in ".".join(instruction.modifiers):
            waiting.append(_registers(instruction.operands[0]))
            most = max(most, len(waiting))
        else:
            read = set[str]().union(*map(_registers, instruction.operands[1:]))
            waiting = [loaded for loaded in waiting if not loaded & read]
    rest = 0 if rows > gemv.MAX_SCALAR_ROWS else 2 * gemv.OUTPUTS if gated else gemv.OUTPUTS
    assert most == 8 + rest


def test_few_outputs_of_many_inputs_are_shared() -> None:
    """A block's warps take the steps of a row in turn where whole rows for each would leave a GPU idle."""
    h200 = Device(132, 227 * 1024)
    weight = torch.empty(151936, 4864, dtype=torch.bfloat16, device="meta")
    down, short, head, gated = weight[:896], weight[:896, :896], weight, weight[:3000, :1100]
    assert [gemv.shares(w, len(w), h200) for w in (down, short, head)] == [True, False, False]
    assert gemv.shares(gated, 1500, h200) and not gemv.shares(gated, 3000, h200)
    long, whole = make(1, 8, 4096, torch.bfloat16, int8=False), make(1, 64, 4096, torch.bfloat16, int8=False)
    blocks = [count(lambda args=args: gemv.linear(**args)).by_block for args in (long, whole)]
    assert [len(of_block) for of_block in blocks] == [4, 8]  # two outputs a block instead of eight
    assert max(blocks[0].values()) < 0.4 * max(blocks[1].values())


def _registers(operand: Operand) -> set[str]:
    if isinstance(operand, Vector):
        return set[str]().union(*map(_registers, operand.items))
    if isinstance(operand, Address):
        return _registers(operand.base) if isinstance(operand.base, Register) else set()
    return {operand.name} if isinstance(operand, Register) else set()


def test_supports_says_why_not() -> None:
    """What the kernel cannot take is named."""
    x, weight = torch.zeros(2, 64, dtype=torch.bfloat16), torch.zeros(8, 64, dtype=torch.bfloat16)
    assert gemv.supports(x, weight) is None and gemv.supports(x, weight.to(torch.int8)) is None
    assert gemv.supports(x.float(), weight) == "dtype torch.float32"
    assert gemv.supports(x, weight.half()) == "weights of torch.float16"
    assert gemv.supports(x.repeat(5, 1), weight) == "more than 8 rows"
    assert gemv.supports(x[:, :32], weight[:, :32]) == "strided weights"
    assert gemv.supports(x[:, :24], weight[:, :24].to(torch.int8, memory_format=torch.contiguous_format)) == "24 inputs"
