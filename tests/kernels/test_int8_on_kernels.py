"""INT8 weights and many rows: activations are rounded to 8 bits, or with `int8-weights` left as they are."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cuda_kernels.launch import using
from cuda_kernels.tuning import tuning
from tests.kernels.helpers import ROUNDING
from tests.model import families
from tests.model.golden import make_golden
from tests.model.paged import Paged, load
from tests.model.test_reduced_precision import errors
from tests.model_runner.tape import Tapes
from tools.kernel_lab.cases import round_tokens
from tools.ptx_simulator import SimulatedLauncher
from trio_llm.model.ops import cuda as ops_cuda
from trio_llm.model.ops import seam as ops
from trio_llm.model.ops import torch_reference as ops_torch
from trio_llm.model.ops.dispatch import Dispatch, dispatching

SHAPE = {"head_dim": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
WIDENED = "many rows, INT8 weights widened"
FEW, MANY = tuning(torch.device("cpu")).gemm_rows, tuning(torch.device("cpu")).gemm_rows + 6


@pytest.fixture
def on_kernels() -> Generator[Dispatch]:
    """Run the CUDA kernels on CPU tensors, simulated, and tell what ran where."""
    with using(SimulatedLauncher()), dispatching(Dispatch("cuda", ops_cuda, "cpu")) as counting:
        yield counting


def make(inputs: int = 128, *, exact: bool = False) -> tuple[Tensor, ops.Int8]:
    """Return activations and a matrix of 24 outputs."""
    torch.manual_seed(inputs)
    weight = torch.randint(-127, 128, (24, inputs), dtype=torch.int8)
    matrix = ops.Int8(weight, (torch.rand(24) / 100).bfloat16(), torch.randn(24).bfloat16(), exact=exact)
    return torch.randn(MANY, inputs).bfloat16(), matrix


def distance(x: Tensor, matrix: ops.Int8) -> tuple[Tensor, Tensor]:
    """Return how far a product is from float64's, beyond three roundings to bfloat16, and how far it may be."""
    assert matrix.bias is not None
    wide, bias = matrix.weight.double() * matrix.scale.double()[:, None], matrix.bias.double()
    product = x.double() @ wide.T
    error = (ops.linear(x, matrix).double() - product - bias).abs()
    return error - 3 * ROUNDING[x.dtype] * (product.abs() + bias.abs()), x.double().abs().amax(
        1, keepdim=True
    ) / 254 * wide.abs().sum(1)


def test_activations_of_many_rows_are_rounded(on_kernels: Dispatch) -> None:
    """No product is off by more than a 254th of its row's largest for each weight; up to 64 rows nothing is rounded."""
    x, matrix = make()
    error, most = distance(x, matrix)
    assert (error <= most).all() and (error > most / 100).any()
    error, most = distance(x[:FEW], matrix)
    assert (error <= most * 1e-3).all()
    assert on_kernels.calls == {("linear", "cuda", ""): 2}


def test_exact_weights_leave_activations_as_they_are(on_kernels: Dispatch) -> None:
    """Then the weights are widened for cuBLAS, which the counts say; so they are where a shape has no kernel."""
    for x, matrix in (make(exact=True), make(inputs=72)):
        error, most = distance(x, matrix)
        assert (error <= most * 1e-3).all()
    assert on_kernels.calls == {("linear", "cublas", WIDENED): 2}


@pytest.mark.parametrize("exact", [False, True])
def test_gates(exact: bool, on_kernels: Dispatch) -> None:
    """A gated layer is one product, or two and an activation of its own."""
    x, matrix = make(exact=exact)
    numbers, scale = round_tokens(x)
    wide = ops.Int8(matrix.weight, matrix.scale.float(), None if matrix.bias is None else matrix.bias.float())
    expected = ops_torch.linear(x.float() if exact else numbers * scale[:, None], wide)
    got = ops.gated_linear(x, matrix, "silu").float()
    torch.testing.assert_close(got, ops_torch.act_and_mul(expected, "silu"), rtol=0.03, atol=0.03)
    assert on_kernels.calls == {("gated_linear", *(("cublas", WIDENED) if exact else ("cuda", ""))): 1}


def test_a_row_does_not_depend_on_how_many_there_are(on_kernels: Dispatch) -> None:
    """Beside 69 others and beside 135: the same bits. A NaN stays in its row."""
    x, matrix = make()
    x[3, 5] = torch.nan
    several, twice = ops.linear(x, matrix), ops.linear(torch.cat([x, x[1:67]]), matrix)
    assert torch.equal(several.nan_to_num(7), twice[:MANY].nan_to_num(7))
    assert several.isnan().all(1).tolist() == [row == 3 for row in range(MANY)]


@pytest.mark.parametrize(("quantization", "exact"), [("int8", False), ("int8-weights", True)])
def test_a_prompt_gives_the_models_logits(
    quantization: str, exact: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_kernels: Dispatch
) -> None:
    """Four prompts of 89 tokens as one batch, within what INT8 weights and bfloat16 cost."""
    monkeypatch.setitem(families.FAMILIES, "on-kernels", lambda: families._llama(**SHAPE))
    golden = make_golden("on-kernels", tmp_path)
    loaded = load(tmp_path, block_size=16, dtype="bfloat16", quantization=quantization)
    got = Paged(loaded, len(golden.prompts)).prefill(golden.prompts, None)
    rms, kl = errors(torch.cat(golden.logits), torch.cat(got))
    assert rms < 0.12 and kl < 0.004
    where = {(implementation, reason) for op, implementation, reason in on_kernels.calls if "linear" in op}
    assert where == {("cublas", WIDENED) if exact else ("cuda", "")}


def test_graphs_may_contain_many_rows(on_kernels: Dispatch) -> None:
    """A replay rounds and multiplies what is there then."""
    x, matrix = make()
    out: list[Tensor] = []
    replay = Tapes().capture(lambda: out.__setitem__(slice(None), [ops.linear(x, matrix)]))
    x.copy_(torch.randn(x.shape))
    replay()
    assert torch.equal(out[0], ops.linear(x, matrix))
    assert {how for _, how, _ in on_kernels.calls} == {"cuda"}
