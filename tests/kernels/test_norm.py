"""RMSNorm and its fusion with the residual addition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cuda_kernels import norm
from tests.kernels.helpers import assert_close, count, simulate

EPS = 1e-6


def reference(x: Tensor, weight: Tensor | None) -> Tensor:
    """Normalise in float64."""
    x = x.double()
    y = x * (x.pow(2).mean(-1, keepdim=True) + EPS).rsqrt()
    return y if weight is None else y * weight.double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "hidden"), [(3, 64), (5, 896), (2, 4096), (1, 5376)])
def test_rms_norm(rows: int, hidden: int, dtype: torch.dtype) -> None:
    """Rows of every width are normalised as in float64, with a weight and without, from a strided input."""
    torch.manual_seed(hidden)
    x, weight = torch.randn(rows, hidden + 64).to(dtype)[:, :hidden], torch.randn(hidden).to(dtype)
    for w in (weight, None):
        (out,) = simulate(lambda w=w: (norm.rms_norm(x, w, EPS),))
        assert_close(out, reference(x, w))


def test_rms_norm_of_heads() -> None:
    """Leading dimensions are kept."""
    x = torch.randn(2, 3, 128).bfloat16()
    (out,) = simulate(lambda: (norm.rms_norm(x, None, EPS),))
    assert_close(out, reference(x, None))


@pytest.mark.parametrize("hidden", [64, 896, 4096])
def test_add_rms_norm(hidden: int) -> None:
    """The sum is rounded before it is normalised, as the next layer will read it; the inputs stay."""
    torch.manual_seed(hidden)
    x, residual, (weight, _, _) = (torch.randn(3, hidden).bfloat16() for _ in range(3))
    before = residual.clone()
    out, total = simulate(lambda: norm.add_rms_norm(x, residual, weight, EPS))
    assert torch.equal(total, x + residual) and torch.equal(residual, before)
    assert_close(out, reference(total, weight))


def test_traffic_is_the_least_possible() -> None:
    """Each row is read once and written once, in full sectors, and shared memory has no conflicts."""
    x, residual, weight = (torch.randn(64, 1024).bfloat16() for _ in range(3))
    counted = count(lambda: norm.add_rms_norm(x, residual, weight[0], EPS))
    assert counted.sectors == counted.sectors_least
    assert sum(counted.sectors.values()) == 5 * 64 * 1024 * 2 // 32  # x, residual, weight in; total, out out
    assert counted.passes == counted.passes_least


def test_supports_says_why_not() -> None:
    """A dtype or width that the kernel cannot take is named."""
    assert norm.supports(torch.zeros(1, 64, dtype=torch.bfloat16)) is None
    assert norm.supports(torch.zeros(1, 64)) == "dtype torch.float32"
    assert norm.supports(torch.zeros(1, 1 << 16, dtype=torch.float16)) == "hidden size 65536"
