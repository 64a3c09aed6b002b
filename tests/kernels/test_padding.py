"""Rows that only fill a batch up to a graph's size: whatever they hold, the others come out as without them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cuda_kernels import act, gemm, gemm_s8, gemm_w4, gemv, moe, norm, quant
from cuda_kernels.launch import using
from tools.ptx_simulator import SimulatedLauncher
from trio_llm.model.ops.matrices import Blocks, Tiles

REAL = [0, 2, 5]
WEIGHT = torch.randn(32, 64).bfloat16()
BYTES = torch.randint(-127, 128, (32, 64), dtype=torch.int8)
SCALE = (torch.rand(32) / 100).bfloat16()
TILES = Tiles.of(Blocks(torch.randint(0, 256, (32, 32), dtype=torch.uint8), torch.rand(32, 2)))
OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gemv": lambda x: gemv.linear(x, WEIGHT),
    "gemv, int8 and gated": lambda x: gemv.linear(x, BYTES, scale=SCALE, activation="silu"),
    "gemm": lambda x: gemm.linear(x, BYTES, SCALE),
    "gemm_s8": lambda x: gemm_s8.linear(*quant.quantize_tokens(x), BYTES, SCALE),
    "gemm_w4": lambda x: gemm_w4.linear(x, TILES.weight, TILES.scale),
    "rms_norm": lambda x: norm.rms_norm(x, WEIGHT[0], 1e-6),
    "add_rms_norm": lambda x: torch.cat(norm.add_rms_norm(x, x, WEIGHT[0], 1e-6), dim=-1),
    "act_and_mul": lambda x: act.act_and_mul(x, "gelu_tanh"),
    "route": lambda x: torch.cat([part.double() for part in moe.route(x[:, :8], 2)], dim=-1),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("filling", [torch.nan, torch.inf, 3e38])
def test_rows_are_computed_apart(name: str, filling: float) -> None:
    """Beside rows of NaN, infinities and huge numbers the real ones are the same bit for bit."""
    x = torch.full((7, 64), filling).bfloat16()
    x[REAL] = torch.randn(3, 64).bfloat16()
    usual = x.clone()
    usual[[1, 3, 4, 6]] = 1.0
    with using(SimulatedLauncher()):
        beside, expected = OPERATIONS[name](x)[REAL], OPERATIONS[name](usual)[REAL]
    assert torch.equal(beside, expected) and beside.isfinite().all()
