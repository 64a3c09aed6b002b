"""Mixture of experts: choice, sort, grouped products and sum."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cuda_kernels import moe
from cuda_kernels.launch import using
from tests.kernels.helpers import assert_close, count, simulate
from tools.ptx_simulator import SimulatedLauncher


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (128, 8), (6, 3), (40, 1)])
def test_route(experts: int, top_k: int) -> None:
    """The likeliest experts, likeliest first, with renormalised weights; the lowest id among equals."""
    logits = torch.randperm(7 * experts).view(7, experts).div(experts * 3).to(torch.float16)
    logits[0] = 1.0
    weights, ids = simulate(lambda: moe.route(logits, top_k))
    chosen, expected = logits.double().softmax(-1).sort(dim=-1, descending=True, stable=True)
    assert torch.equal(ids, expected[:, :top_k])
    chosen = chosen[:, :top_k]
    torch.testing.assert_close(weights.double(), chosen / chosen.sum(-1, keepdim=True), rtol=1e-5, atol=1e-6)


def reference(x: Tensor, weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor, kind: str) -> Tensor:
    """Run every token through its experts, one by one, in float64."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token, (row, chosen) in enumerate(zip(x.double(), ids.tolist(), strict=True)):
        for weight, expert in zip(weights[token].double(), chosen, strict=True):
            gate, up = (gate_up[expert].double() @ row).chunk(2)
            gate = F.silu(gate) if kind == "silu" else F.gelu(gate, approximate="tanh")
            out[token] += weight * (down[expert].double() @ (gate * up))
    return out


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "hidden", "width", "kind", "dtype"),
    [
        (1, 8, 2, 128, 192, "silu", torch.bfloat16),
        (20, 4, 3, 64, 64, "gelu_tanh", torch.float16),
        (70, 2, 1, 64, 64, "silu", torch.bfloat16),
        (50, 40, 3, 64, 64, "silu", torch.bfloat16),
    ],
)
def test_moe(
    tokens: int, experts: int, top_k: int, hidden: int, width: int, kind: Literal["silu", "gelu_tanh"],
    dtype: torch.dtype,
) -> None:  # fmt: skip
    """Few tokens or many, experts too, tiles of 16 or 64: as one by one; the experts' load is counted."""
    torch.manual_seed(tokens)
    x, gate_up = torch.randn(tokens, hidden).to(dtype), (torch.randn(experts, 2 * width, hidden) / 8).to(dtype)
    down = (torch.randn(experts, hidden, width) / 8).to(dtype)
    weights, ids = torch.rand(tokens, experts).topk(top_k)

    def run() -> tuple[Tensor, Tensor]:
        load = torch.ones(experts, dtype=torch.int64)
        return moe.moe(x, weights, ids, gate_up, down, load, kind), load

    out, load = simulate(run, orders=(0, 2))
    assert load.tolist() == (ids.flatten().bincount(minlength=experts) + 1).tolist()
    assert_close(out, reference(x, weights, ids, gate_up, down, kind), slack=6)


def test_experts_of_int8_weights() -> None:
    """Weights of a byte with a scale per output and expert give what the widened ones give."""
    torch.manual_seed(3)
    x = torch.randn(21, 64).bfloat16()
    gate_up, down = (torch.randint(-127, 128, shape, dtype=torch.int8) for shape in ((4, 128, 64), (4, 64, 64)))
    scales = (torch.rand(4, 128) / 500).bfloat16(), (torch.rand(4, 64) / 500).bfloat16()
    weights, ids = torch.rand(21, 4).topk(2)
    load = torch.zeros(4, dtype=torch.int64)
    (out,) = simulate(lambda: (moe.moe(x, weights, ids, gate_up, down, load, "silu", scales),), orders=(0, 2))
    wide = (matrix * scale[..., None].double() for matrix, scale in zip((gate_up, down), scales, strict=True))
    assert_close(out, reference(x, weights, ids, *wide, "silu"), slack=12)


def test_padding_goes_to_no_expert() -> None:
    """Tokens whose ids are -1, whatever they hold, change nothing for the others and count in no load."""
    torch.manual_seed(4)
    x, gate_up = torch.randn(9, 64).bfloat16(), (torch.randn(4, 128, 64) / 8).bfloat16()
    down = (torch.randn(4, 64, 64) / 8).bfloat16()
    weights, ids = torch.rand(9, 4).topk(2)
    real, load = torch.tensor([0, 2, 3, 7]), torch.zeros(4, dtype=torch.int64)
    padded = torch.ones(9, dtype=torch.bool).index_fill(0, real, False)
    x[padded], weights[padded], ids[padded] = torch.nan, torch.nan, -1
    (out,) = simulate(lambda: (moe.moe(x, weights, ids, gate_up, down, load, "silu")[real],), orders=(0, 2))
    assert load.tolist() == (2 * ids[real].flatten().bincount(minlength=4)).tolist()  # once for each order
    with using(SimulatedLauncher()):
        alone = moe.moe(x[real], weights[real], ids[real], gate_up, down, load, "silu")
    assert torch.equal(out, alone)


def test_weights_of_chosen_experts_are_read_once() -> None:
    """For one token the traffic is the chosen experts' weights, and little else."""
    x = torch.randn(1, 256).bfloat16()
    gate_up, down = torch.randn(8, 256, 256).bfloat16(), torch.randn(8, 256, 128).bfloat16()
    weights, ids = torch.tensor([[0.5, 0.5]]), torch.tensor([[3, 6]])
    load = torch.zeros(8, dtype=torch.int64)
    counted = count(lambda: moe.moe(x, weights, ids, gate_up, down, load, "silu"))
    least = 2 * (256 * 256 + 256 * 128) * 2 // 32
    assert least < counted.sectors["cp"] < 1.05 * least
    assert counted.passes["ldmatrix"] == counted.passes_least["ldmatrix"]


def test_supports_says_why_not() -> None:
    """What the kernels cannot take is named."""
    x, gate_up = torch.zeros(1, 64, dtype=torch.float16), torch.zeros(4, 128, 64, dtype=torch.float16)
    down = torch.zeros(4, 64, 64, dtype=torch.float16)
    assert moe.supports(x, gate_up, down) is None
    assert moe.supports(x.float(), gate_up, down) == "dtype torch.float32"
    assert moe.supports(x, gate_up.to(torch.int8), down.to(torch.int8)) is None
    assert moe.supports(x, gate_up.to(torch.int8), down) == "weights of torch.int8"
    assert moe.supports(x, gate_up.expand(4, -1, -1).repeat(200, 1, 1), down) == "800 experts"
    assert moe.supports(x, gate_up, down[..., :24]) == "experts of 24 by 64"
    assert moe.supports_route(x, 2) is None
    assert moe.supports_route(x.float(), 2) == "dtype torch.float32"
    assert moe.supports_route(x, 40) == "40 of 64 experts"
