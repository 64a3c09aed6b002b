"""Blocks as matrices: dividing, fusing and reordering them is dividing, fusing and reordering the weights."""

from __future__ import annotations

import attrs
import pytest
import torch
from torch import Tensor

from trio_llm.model.ops import cpu as native
from trio_llm.model.ops import seam as ops
from trio_llm.model.ops.dispatch import Dispatch, dispatching
from trio_llm.model.ops.seam import Blocks, Dense, Stacked
from trio_llm.model.ops.torch_reference import dequantize, round_to_int8


def _make(form: str, outputs: int, inputs: int = 512, group: int = 32) -> Blocks:
    torch.manual_seed(len(form) + outputs)
    groups = (outputs, inputs // group)
    nibbles = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8)
    scale = torch.rand(groups).half() / 64
    match form:
        case "zero":
            return Blocks(nibbles, scale, zero=torch.randint(0, 16, groups, dtype=torch.int8))
        case "minimum":
            return Blocks(nibbles, scale, minimum=torch.randn(groups).half())
        case "outer":
            codes = torch.randint(-8, 8, (2, *groups), dtype=torch.int8)
            return Blocks(nibbles, codes[0], minimum=codes[1], outer=torch.rand(outputs, inputs // 256, 2).half() / 64)
        case _:
            return Blocks(torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8), scale)


FORMS = ("zero", "minimum", "outer", "8 bits")


@pytest.mark.parametrize("form", FORMS)
def test_parts_are_parts_of_the_weight(form: str) -> None:
    """Rows, columns at the bounds of groups, rows divided into rows, and two matrices as one."""
    matrix, other = _make(form, 6), _make(form, 3)
    wide = dequantize(matrix)
    assert torch.equal(dequantize(matrix.rows(slice(1, 4))), wide[1:4])
    assert torch.equal(dequantize(matrix.rows(torch.tensor([5, 0]))), wide[[5, 0]])
    assert torch.equal(dequantize(matrix.columns(256, 512)), wide[:, 256:])
    assert matrix.can_divide(2)
    assert torch.equal(dequantize(matrix.divided(2)), wide.view(12, 256))
    assert matrix.fits(other)
    assert torch.equal(dequantize(Blocks.fused([matrix, other])), torch.cat([wide, dequantize(other)]))
    experts = Blocks.of_experts(2, iter([matrix, matrix]))
    assert torch.equal(dequantize(experts), torch.stack([wide, wide]))
    assert matrix.nbytes == other.nbytes * 2 == experts.nbytes / 2


def test_columns_end_where_groups_do() -> None:
    """Half a group has no scale of its own; neither has half of what an outer scale is for."""
    for matrix, end in ((_make("zero", 2), 48), (_make("outer", 2), 288)):
        with pytest.raises(AssertionError, match="at the bounds of groups"):
            matrix.columns(0, end)
    assert not _make("outer", 2).can_divide(4)


def test_matrices_of_other_formats_are_not_fused() -> None:
    """Another size of groups, another offset and another order of inputs are each a reason."""
    matrix = _make("zero", 4)
    order = torch.randperm(512)
    ordered = attrs.evolve(matrix, order=order)
    assert ordered.fits(attrs.evolve(matrix, order=order.clone()))
    for other in (_make("zero", 4, group=64), _make("minimum", 4), _make("8 bits", 4), ordered):
        assert not matrix.fits(other)
    assert not ordered.fits(attrs.evolve(matrix, order=order.flip(0)))


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("form", FORMS)
def test_an_order_of_inputs_is_that_of_activations(form: str, rows: int) -> None:
    """Reference and kernels choose activations by it; the kernels round these, in their own groups of 32."""
    matrix, order, bias = _make(form, 20), torch.randperm(512), torch.randn(20)
    matrix = attrs.evolve(matrix, order=order, bias=bias)
    x = torch.randn(rows, 512)
    wide = torch.empty(20, 512).index_copy_(1, order, dequantize(matrix))
    torch.testing.assert_close(ops.linear(x, matrix), x @ wide.T + bias, rtol=1e-4, atol=1e-3)
    expected = round_to_int8(x[:, order]) @ dequantize(matrix).T + bias
    torch.testing.assert_close(_natively(x, matrix), expected, rtol=1e-4, atol=1e-3)


def test_a_stack_multiplies_each_part() -> None:
    """Outputs are one part's after the other's, gated ones too, in the reference and by kernels."""
    x = torch.randn(3, 512)
    parts = (_make("zero", 20), Dense(torch.randn(4, 512)), _make("8 bits", 8))
    expected = torch.cat([ops.linear(x, part) for part in parts], -1)
    stacked = Stacked(parts)
    assert torch.equal(ops.linear(x, stacked), expected)
    gate, up = expected.chunk(2, -1)
    torch.testing.assert_close(ops.gated_linear(x, stacked, "silu"), torch.nn.functional.silu(gate) * up)
    with dispatching(Dispatch("native", native, "cpu")):
        packed = Stacked(tuple(ops.pack(part) for part in parts))  # type: ignore[arg-type]
        torch.testing.assert_close(ops.linear(x, packed)[:, 20:24], expected[:, 20:24], rtol=1e-4, atol=1e-3)


def _natively(x: Tensor, matrix: Blocks) -> Tensor:
    with dispatching(Dispatch("native", native, "cpu")):
        return ops.linear(x, ops.pack(matrix))
