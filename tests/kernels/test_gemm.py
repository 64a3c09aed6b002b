"""Linear layers of int8 weights for more rows than a GEMV takes."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cuda_kernels import gemm
from cuda_kernels.paged_attn import Device
from tests.kernels.compilers import most
from tests.kernels.helpers import assert_close, count, simulate


def make(rows: int, n: int, k: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return arguments of `linear`, the input a strided view."""
    torch.manual_seed(rows + n + k)
    return {
        "x": torch.randn(rows, k + 8).to(dtype)[:, :k],
        "weight": torch.randint(-127, 128, (n, k), dtype=torch.int8),
        "scale": (torch.rand(n) / 100).to(dtype),
        "bias": torch.randn(n).to(dtype),
    }


def reference(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Multiply in float64."""
    return x.double() @ weight.double().T * scale.double() + bias.double()


@pytest.mark.parametrize(
    ("rows", "n", "k", "dtype", "splits"),
    [(9, 80, 64, torch.bfloat16, 1), (20, 64, 192, torch.float16, 3), (64, 132, 128, torch.bfloat16, 2),
     (70, 12, 1088, torch.bfloat16, 1), (17, 68, 320, torch.float16, 3)],
)  # fmt: skip
def test_linear(rows: int, n: int, k: int, dtype: torch.dtype, splits: int) -> None:
    """Any number of rows and outputs, in every tile, inputs shared or not, more stages than steps or fewer."""
    args = make(rows, n, k, dtype)
    (out,) = simulate(lambda: (gemm.linear(**args, splits=splits),))
    assert_close(out, reference(**args), slack=2)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
def test_gated(kind: Literal["silu", "gelu_tanh"], splits: int) -> None:
    """Gate and up are computed by the same warp, which writes act(gate) * up."""
    args = make(17, 72, 128, torch.bfloat16)
    (out,) = simulate(lambda: (gemm.linear(**args, activation=kind, splits=splits),), orders=(0, 2))
    gate, up = reference(**args).chunk(2, dim=-1)
    assert_close(out, (F.silu(gate) if kind == "silu" else F.gelu(gate, approximate="tanh")) * up, slack=2)


# Thread instructions per weight: measured, plus a tenth.
@pytest.mark.parametrize(("rows", "most_instructions"), [(16, 7.7), (64, 10.3)])
def test_weights_are_read_once_without_conflicts(rows: int, most_instructions: float) -> None:
    """Weights and inputs move in full sectors, no bank is asked twice, and instructions per weight are few."""
    args = make(rows, 128, 1024, torch.bfloat16)
    args["x"] = args["x"].contiguous()
    counted = count(lambda: gemm.linear(**args, splits=1))
    blocks = 128 // gemm.BN
    assert counted.sectors["cp"] * 32 == args["weight"].nbytes + blocks * args["x"].nbytes
    for opcode in ("ldmatrix", "ld"):
        assert counted.passes[opcode] == counted.passes_least[opcode]
    instructions = counted.issued.total() * 32 / args["weight"].numel()
    assert instructions < most(most_instructions)


def test_few_blocks_share_the_inputs() -> None:
    """Where tiles of outputs do not fill a device, several blocks take a part of the inputs each, none an empty one."""
    h200 = Device(132, 227 * 1024)
    assert [gemm.choose_splits(blocks, h200) for blocks in (14, 96, 384)] == [18, 2, 1]
    assert [gemm.split(steps, wanted) for steps, wanted in ((76, 18), (4, 18), (5, 4), (7, 1))] == [
        (5, 16), (1, 4), (2, 3), (7, 1),
    ]  # fmt: skip


def test_supports_says_why_not() -> None:
    """What the kernel cannot take is named."""
    x, weight = torch.zeros(9, 64, dtype=torch.bfloat16), torch.zeros(8, 64, dtype=torch.int8)
    assert gemm.supports(x, weight) is None
    assert gemm.supports(x.float(), weight) == "dtype torch.float32"
    assert gemm.supports(x, weight[:, :32]) == "strided weights"
    assert gemm.supports(x, weight[:6]) == "64 inputs and 6 outputs"
