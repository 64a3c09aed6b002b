"""Quantisation of weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cuda_kernels import quant
from tests.kernels.helpers import simulate
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


def test_supports_says_why_not() -> None:
    """A dtype or width that the kernel cannot take is named."""
    assert quant.supports(torch.zeros(2, 8).half()) is None
    assert quant.supports(torch.zeros(2, 8)) == "dtype torch.float32"
    assert quant.supports(torch.zeros(1, 9).half()) == "rows that do not begin at 16 bytes"
