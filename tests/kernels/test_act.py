"""Gated activations."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
import torch.nn.functional as F

from cuda_kernels import act
from tests.kernels.helpers import assert_close, count, simulate


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("width", [8, 704, 4864])
def test_act_and_mul(kind: Literal["silu", "gelu_tanh"], width: int, dtype: torch.dtype) -> None:
    """The activation of the first half times the second, as in float64, at extremes too."""
    torch.manual_seed(width)
    gate_up = (torch.randn(3, 2 * width) * 3).to(dtype)
    gate_up[0, :4] = torch.tensor([-90.0, 90.0, 0.0, -9.0])
    (out,) = simulate(lambda: (act.act_and_mul(gate_up, kind),))
    gate, up = gate_up.double().chunk(2, dim=-1)
    assert_close(out, (F.silu(gate) if kind == "silu" else F.gelu(gate, approximate="tanh")) * up, slack=2)


def test_traffic_is_the_least_possible() -> None:
    """Every sector is moved once."""
    counted = count(lambda: act.act_and_mul(torch.randn(16, 2048).bfloat16(), "silu"))
    assert counted.sectors == counted.sectors_least
    assert sum(counted.sectors.values()) == 3 * 16 * 1024 * 2 // 32


def test_supports_says_why_not() -> None:
    """A dtype or width that the kernel cannot take is named."""
    assert act.supports(torch.zeros(1, 64, dtype=torch.bfloat16)) is None
    assert act.supports(torch.zeros(1, 64)) == "dtype torch.float32"
    assert act.supports(torch.zeros(1, 24, dtype=torch.bfloat16)) == "width 24"
