"""Rounding to int8, of weights and of activations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cuda_kernels import quant
from tests.kernels.helpers import count, simulate
from tools.kernel_lab.cases import round_tokens
from trio_llm.model.ops import torch_reference as ops_torch


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inputs", [8, 2056])
def test_rows_are_quantised_as_by_the_reference(inputs: int, dtype: torch.dtype) -> None:
    """The same scales and the same integers, a row of zeros and one of a single large entry included."""
    torch.manual_seed(inputs)
    dense = torch.randn(5, inputs).to(dtype)
    dense[1] = 0
    dense[2, 3] = 300

    def empty() -> tuple[Tensor, Tensor]:
        return torch.zeros(5, inputs, dtype=torch.int8), torch.zeros(5, dtype=dtype)

    def run() -> tuple[Tensor, Tensor]:
        quantised = empty()
        quant.quantize_rows(dense, *quantised)
        return quantised

    weight, scale = simulate(run)
    expected_weight, expected_scale = empty()
    ops_torch.quantize_rows(dense, expected_weight, expected_scale)
    assert torch.equal(scale, expected_scale) and torch.equal(weight, expected_weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inputs", [8, 2056])
def test_tokens_are_rounded_to_the_nearest(inputs: int, dtype: torch.dtype) -> None:
    """By at most half a scale, whatever a row's size, with the largest entry at 127 or -127; rows may be strided."""
    torch.manual_seed(inputs)
    x = torch.randn(6, inputs + 8).to(dtype)[:, :inputs]
    x *= torch.tensor([1, 0, 300, 1e-4, 6e4, 1]).to(dtype)[:, None] / x.abs().amax(1, keepdim=True)
    numbers, scale = simulate(lambda: quant.quantize_tokens(x))
    for got, expected in zip((numbers, scale), round_tokens(x), strict=True):
        assert torch.equal(got, expected)
    assert ((numbers.double() * scale.double()[:, None] - x.double()).abs() <= scale.double()[:, None] * 0.50001).all()
    assert numbers.abs().amax(1).tolist() == [127, 0, 127, 127, 127, 127]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("poison", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_a_poisoned_token_stays_one(poison: float, dtype: torch.dtype) -> None:
    """Its scale is NaN, so that all of its products are; the tokens beside it have their own."""
    x = torch.randn(3, 4096).to(dtype)
    x[1, 2100] = poison
    numbers, scale = simulate(lambda: quant.quantize_tokens(x))
    assert scale.isnan().tolist() == [False, True, False]
    assert torch.equal(numbers[::2], round_tokens(x[::2])[0])


def test_a_token_is_read_in_whole_sectors() -> None:
    """Twice, the second time from a cache; thread instructions an entry are few."""
    x = torch.randn(4, 4096).bfloat16()
    counted = count(lambda: quant.quantize_tokens(x))
    assert counted.sectors["ld"] * 32 == 2 * x.nbytes
    assert counted.issued.total() * 32 / x.numel() < 16.6  # measured, plus a tenth


def test_supports_says_why_not() -> None:
    """A dtype or width that the kernel cannot take is named."""
    assert quant.supports(torch.zeros(2, 8).half()) is None
    assert quant.supports(torch.zeros(2, 8)) == "dtype torch.float32"
    assert quant.supports(torch.zeros(1, 9).half()) == "rows that do not begin at 16 bytes"
