"""Linear layers of a few rows."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cuda_kernels import gemv
from tests.kernels.helpers import assert_close, count, simulate


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
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 18, 896), (3, 7, 272), (8, 16, 128)])
def test_linear(rows: int, n: int, k: int, dtype: torch.dtype, int8: bool) -> None:
    """Products of any shape, of 16-bit and of int8 weights, with a bias and a residual."""
    args = make(rows, n, k, dtype, int8=int8)
    bias, residual = torch.randn(n).to(dtype), torch.randn(rows, n).to(dtype)
    (out,) = simulate(lambda: (gemv.linear(**args, bias=bias, residual=residual),))
    assert_close(out, reference(**args, bias=bias) + residual.double(), slack=2)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
def test_gated(kind: Literal["silu", "gelu_tanh"], int8: bool) -> None:
    """Gate and up are computed by the same warp, which writes act(gate) * up."""
    args = make(2, 20, 192, torch.bfloat16, int8=int8)
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
    assert counted.issued.total() * 32 / (64 * 2048) < 8  # thread instructions per weight


def test_supports_says_why_not() -> None:
    """What the kernel cannot take is named."""
    x, weight = torch.zeros(2, 64, dtype=torch.bfloat16), torch.zeros(8, 64, dtype=torch.bfloat16)
    assert gemv.supports(x, weight) is None and gemv.supports(x, weight.to(torch.int8)) is None
    assert gemv.supports(x.float(), weight) == "dtype torch.float32"
    assert gemv.supports(x, weight.half()) == "weights of torch.float16"
    assert gemv.supports(x.repeat(5, 1), weight) == "more than 8 rows"
    assert gemv.supports(x[:, :32], weight[:, :32]) == "strided weights"
    assert gemv.supports(x[:, :24], weight[:, :24].to(torch.int8, memory_format=torch.contiguous_format)) == "24 inputs"
