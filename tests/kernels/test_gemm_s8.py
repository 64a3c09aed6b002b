"""Linear layers of int8 weights for many rows, which are rounded to int8 too."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cuda_kernels import gemm_s8, quant
from tests.kernels.compilers import most
from tests.kernels.helpers import ROUNDING, assert_close, count, simulate


def make(rows: int, n: int, k: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return arguments of `linear`."""
    torch.manual_seed(rows + n + k)
    return {
        "x": torch.randint(-127, 128, (rows, k), dtype=torch.int8),
        "x_scale": torch.rand(rows) / 30,
        "weight": torch.randint(-127, 128, (n, k), dtype=torch.int8),
        "scale": (torch.rand(n) / 100).to(dtype),
        "bias": torch.randn(n).to(dtype),
    }


def reference(x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Multiply in float64."""
    return x.double() @ weight.double().T * x_scale.double()[:, None] * scale.double() + bias.double()


@pytest.mark.parametrize(
    ("rows", "n", "k", "dtype", "splits"),
    [(65, 132, 64, torch.bfloat16, 1), (130, 12, 192, torch.float16, 3), (1, 256, 320, torch.bfloat16, 2),
     (200, 72, 384, torch.bfloat16, 1)],
)  # fmt: skip
def test_linear(rows: int, n: int, k: int, dtype: torch.dtype, splits: int) -> None:
    """Any number of rows and outputs, more stages than steps or fewer, inputs shared or not."""
    args = make(rows, n, k, dtype)
    (out,) = simulate(lambda: (gemm_s8.linear(**args, splits=splits),))
    assert_close(out, reference(**args))


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
def test_gated(kind: Literal["silu", "gelu_tanh"], splits: int) -> None:
    """Gate and up are computed by the same warp, which writes act(gate) * up."""
    args = make(67, 136, 128, torch.bfloat16)
    (out,) = simulate(lambda: (gemm_s8.linear(**args, activation=kind, splits=splits),), orders=(0, 2))
    gate, up = reference(**args).chunk(2, dim=-1)
    assert_close(out, (F.silu(gate) if kind == "silu" else F.gelu(gate, approximate="tanh")) * up, slack=2)


@pytest.mark.parametrize("splits", [1, 3])
def test_sums_are_exact(splits: int) -> None:
    """The largest sums, beyond the whole numbers of a float, are rounded once: to the dtype of the result."""
    args = make(66, 8, 1088, torch.float16)
    args["x"].fill_(127)[::2] = -127
    args["weight"].fill_(127)[1::2] = -127
    args |= {"x_scale": torch.full((66,), 2.0**-10), "scale": torch.full((8,), 0.5).half(), "bias": None}
    (out,) = simulate(lambda: (gemm_s8.linear(**args, splits=splits),), orders=(0,))
    sums = args["x"].double() @ args["weight"].double().T
    assert sums.abs().max() > 2**24 and torch.equal(out, (sums * 2.0**-11).half())


def test_rounded_activations_are_off_by_what_is_said() -> None:
    """A product differs from that of unrounded activations by at most a 254th of a row's largest for each weight."""
    args = make(70, 40, 256, torch.bfloat16)
    x = torch.randn(70, 256).bfloat16() * torch.logspace(-4, 4, 70)[:, None].bfloat16()
    args["x"], args["x_scale"] = simulate(lambda: quant.quantize_tokens(x), orders=(0,))
    (out,) = simulate(lambda: (gemm_s8.linear(**args),), orders=(0,))
    weight = args["weight"].double() * args["scale"].double()[:, None]
    exact = x.double() @ weight.T + args["bias"].double()
    most = x.double().abs().amax(1, keepdim=True) / 254 * weight.abs().sum(1)
    error = (out.double() - exact).abs()
    assert (error <= most * 1.0001 + ROUNDING[out.dtype] * exact.abs()).all()
    assert (error > most / 100).any(), "nothing was rounded"


def test_a_row_is_the_same_in_any_company() -> None:
    """Alone, among others, and with its inputs shared among blocks: the same bits, as sums have no order."""
    args = make(140, 68, 256, torch.bfloat16)
    alone = {**args, "x": args["x"][9:10], "x_scale": args["x_scale"][9:10]}
    several, one, split = simulate(
        lambda: tuple(
            gemm_s8.linear(**own, splits=splits) for own, splits in ((args, 1), (alone, 1), (alone, 4))
        ), orders=(0,),
    )  # fmt: skip
    assert torch.equal(several[9:10], one) and torch.equal(one, split)


def test_weights_are_read_once_without_conflicts() -> None:
    """Both factors move in full sectors, no bank is asked twice, and tensor cores get most of what is issued.

    Of warp instructions, 2.8 are for each product in the loop: less than the four or more clocks that one takes.
    """
    counted = []
    for k in (512, 1024):
        args = make(128, 128, k, torch.bfloat16)
        counted.append(count(lambda args=args: gemm_s8.linear(**args, splits=1)))
        assert counted[-1].sectors["cp"] * 32 == args["weight"].nbytes + args["x"].nbytes
        assert counted[-1].passes["ldmatrix"] == counted[-1].passes_least["ldmatrix"]
    issued, products = (
        difference(counted[1]) - difference(counted[0])
        for difference in (lambda c: c.issued.total(), lambda c: c.issued["mma"])
    )
    assert products * 16 * 8 * 32 == 128 * 128 * 512
    assert issued / products < most(3.1)  # measured, plus a tenth


def test_supports_says_why_not() -> None:
    """What the kernel cannot take is named."""
    x, weight = torch.zeros(70, 64, dtype=torch.bfloat16), torch.zeros(8, 64, dtype=torch.int8)
    assert gemm_s8.supports(x, weight) is None
    assert gemm_s8.supports(x.float(), weight) == "dtype torch.float32"
    assert gemm_s8.supports(x, weight[:, :32]) == "strided weights"
    assert gemm_s8.supports(x, weight[:6]) == "64 inputs and 6 outputs"
    assert gemm_s8.supports(x, weight[:, :40].contiguous()) == "40 inputs and 8 outputs"
    wide = torch.zeros(1, gemm_s8.MAX_INPUTS + 64, dtype=torch.int8).expand(4, -1).contiguous()
    assert gemm_s8.supports(x, wide) == "131136 inputs and 4 outputs"
    assert gemm_s8.MAX_INPUTS * 127**2 < 2**31
