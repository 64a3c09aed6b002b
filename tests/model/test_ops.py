from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import Tensor

from cuda_kernels.tuning import tuning
from trio_llm.model.ops import cuda as ops_cuda
from trio_llm.model.ops import seam as ops
from trio_llm.model.ops import torch_reference as ops_torch
from trio_llm.model.ops.torch_reference import quantize_rows


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Draw the same numbers in every run."""
    torch.manual_seed(7)


def quantized(dense: Tensor) -> ops.Int8:
    """Quantise a matrix [N, K]."""
    weight, scale = torch.empty(dense.shape, dtype=torch.int8), torch.empty(len(dense), dtype=dense.dtype)
    quantize_rows(dense, weight, scale)
    return ops.Int8(weight, scale)


def test_add_rms_norm_is_an_add_and_a_norm() -> None:
    """The fused form equals the two steps, and the root mean square is the textbook's."""
    x, residual, weight = torch.randn(3, 8), torch.randn(3, 8), torch.randn(8)
    normed, total = ops.add_rms_norm(x, residual, weight, 1e-5)
    expected = (x + residual) / ((x + residual).pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    assert torch.allclose(normed, expected, atol=1e-6)
    assert torch.equal(total, x + residual)


def test_activations_multiply_gate_into_up() -> None:
    """The first half passes the activation, the second half scales it."""
    gate, up = torch.randn(3, 4), torch.randn(3, 4)
    both = torch.cat((gate, up), -1)
    tanh = torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))
    assert torch.allclose(ops.act_and_mul(both, "silu"), gate / (1 + (-gate).exp()) * up, atol=1e-6)
    assert torch.allclose(ops.act_and_mul(both, "gelu_tanh"), 0.5 * gate * (1 + tanh) * up, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inputs", [8, 24, 40, 64])
@pytest.mark.parametrize("rows", [1, 5, 60])
def test_int8_linear_is_right_for_every_shape(dtype: torch.dtype, inputs: int, rows: int) -> None:
    """INT8 matrices multiply correctly whichever kernel runs, those with a width torch's own cannot take included."""
    x, dense, bias = torch.randn(rows, inputs).to(dtype), torch.randn(6, inputs).to(dtype), torch.randn(6).to(dtype)
    matrix = quantized(dense)
    expected = x.double() @ (matrix.weight.double() * matrix.scale.double()[:, None]).T + bias.double()
    got = ops.linear(x, ops.Int8(matrix.weight, matrix.scale, bias))
    assert got.dtype == dtype
    assert (got - expected).abs().max() < 4 * torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize("module", [ops_torch, ops_cuda])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_whole_numbers_stay_in_range(
    module: ModuleType, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A product of a few thousand is right in float16 too, where its sum before the scale is beyond all numbers."""
    monkeypatch.setattr(ops_torch, "_gemm_dtype", lambda own: own)  # a processor with arithmetic in every dtype
    own = replace(tuning(torch.device("cpu")), widened_elements=100)  # several parts
    monkeypatch.setattr(ops_cuda, "tuning", lambda device: own)
    x = torch.full((70, 40), 32.0, dtype=dtype)
    matrix = quantized(torch.rand(6, 40).add(1).to(dtype))
    expected = x.double() @ (matrix.weight.double() * matrix.scale.double()[:, None]).T
    assert expected.max() < 3000
    assert (module.linear(x, matrix) - expected).abs().max() < 2 * torch.finfo(dtype).eps * expected.max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 60])
def test_linear_is_right_in_every_dtype(dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products are right to the dtype's precision, also where many rows make expanding the weights worth it."""
    monkeypatch.setattr(ops_torch, "EXPAND_ELEMENTS", 100)  # several parts
    x, weight, bias = torch.randn(rows, 40).to(dtype), torch.randn(6, 40).to(dtype), torch.randn(6).to(dtype)
    # Forty float32 sums may each round by half of the largest partial sum; the result rounds once more, to the dtype.
    summing = 20 * torch.finfo(torch.float32).eps * (x.double().abs() @ weight.double().abs().T).max()
    for matrix, expected in (
        (ops.Dense(weight), x.double() @ weight.double().T),
        (ops.Dense(weight, bias), x.double() @ weight.double().T + bias.double()),
    ):
        got = ops.linear(x, matrix)
        assert got.dtype == dtype
        assert (got - expected).abs().max() < summing + torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_rows_round_to_half_a_unit(dtype: torch.dtype) -> None:
    """Each weight is within half a unit of its row's scale (and a bit, where the scale itself was rounded)."""
    dense = (torch.randn(9, 32) * torch.logspace(-4, 4, 9)[:, None]).to(dtype)
    dense[3] = 0
    matrix = quantized(dense)
    error = (matrix.weight * matrix.scale.float()[:, None] - dense.float()).abs()
    assert torch.all(error <= 1.01 * matrix.scale.float()[:, None])
    assert (error <= 0.501 * matrix.scale.float()[:, None]).float().mean() > 0.95
    assert torch.equal(matrix.weight[3], torch.zeros(32, dtype=torch.int8))


def test_embedding_rows_are_scaled() -> None:
    """A quantised table gives back its rows, for ids of any shape."""
    dense = torch.randn(10, 16)
    ids = torch.tensor([[3, 9], [0, 3]])
    assert torch.equal(ops.embedding(ids, ops.Dense(dense), torch.float32), dense[ids])
    assert (ops.embedding(ids, quantized(dense), torch.float32) - dense[ids]).abs().max() < 0.02


def test_routing_renormalises_the_best() -> None:
    """The weights of the chosen experts keep their ratios and sum to one."""
    logits = torch.randn(5, 7)
    weights, ids = ops.route(logits, 3)
    assert torch.allclose(weights.sum(-1), torch.ones(5))
    assert torch.allclose(
        weights[:, 0] / weights[:, 2], (logits.gather(1, ids)[:, 0] - logits.gather(1, ids)[:, 2]).exp()
    )
    assert torch.equal(ids, logits.topk(3).indices)


@pytest.mark.parametrize("int8", [False, True])
def test_experts_equal_a_loop_over_tokens(int8: bool) -> None:
    """Sorting tokens by expert changes nothing: each token gets its own experts' weighted sum; loads are counted."""
    x = torch.randn(9, 8)
    weights, ids = ops.route(torch.randn(9, 5), 2)
    gate_up, down = torch.randn(5, 12, 8), torch.randn(5, 8, 6)
    matrices: list[ops.SingleMatrix] = [ops.Dense(gate_up), ops.Dense(down)]
    if int8:
        parts = [[quantized(part) for part in stacked] for stacked in (gate_up, down)]
        matrices = [ops.Int8(torch.stack([p.weight for p in s]), torch.stack([p.scale for p in s])) for s in parts]
        gate_up, down = (torch.stack([p.weight * p.scale[:, None] for p in s]) for s in parts)
    experts = ops.Experts(matrices[0], matrices[1], torch.zeros(5, dtype=torch.int64))
    got = ops.moe(x, weights, ids, experts, "silu")
    for token in range(9):
        expected = torch.zeros(8)
        for weight, expert in zip(weights[token], ids[token], strict=True):
            expected += weight * (down[expert] @ ops.act_and_mul(gate_up[expert] @ x[token], "silu"))
        assert (got[token] - expected).abs().max() < 1e-4
    assert torch.equal(experts.load, ids.flatten().bincount(minlength=5))
