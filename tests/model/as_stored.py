"""Holds a model that is computed as stored to what its widened weights compute."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.model.golden import FP32_TOLERANCE, Golden, max_difference, paged_logits
from trio_llm.model.loading.loader import LoadedModel
from trio_llm.model.ops import cpu as native
from trio_llm.model.ops import torch_reference
from trio_llm.model.ops.dispatch import Dispatch, dispatching
from trio_llm.model.ops.matrices import Blocks, Matrix, Panels

# How far logits of kernels that round activations to 8 bits may be from those without rounding; they are up to 3 to 5.
ROUNDED_TOLERANCE = 0.3


def check_as_stored(load: Callable[[], LoadedModel], made: Golden, family: str) -> LoadedModel:
    """Check that a model computes its widened weights: exactly by the reference, within the rounding by kernels.

    Args:
        load: Loads the model as stored, in float32.
        made: The prompts, and the logits of the widened weights.
    Returns:
        The model, of the reference.
    """
    loaded = load()
    assert max_difference(loaded, made, 7) < FP32_TOLERANCE
    with pytest.MonkeyPatch.context() as patch:
        exact = torch_reference.linear
        patch.setattr(torch_reference, "linear", lambda x, matrix: exact(_rounded(x, matrix), matrix))
        defined = paged_logits(loaded, made, None)
    with dispatching(Dispatch("native", native, "cpu")):
        packed = load()
        assert isinstance(packed.model.layers[0].attention.out, Panels)  # type: ignore[attr-defined]
        got = paged_logits(packed, made, None)
    # A last bit may round an activation the other way, and all that comes after is then rounded differently.
    assert float((got - defined)[0].abs().max()) < 1e-3
    if "moe" not in family and family != "mixtral":  # there a token between two experts may go to the other one
        assert float((got - torch.cat(made.logits)).abs().max()) < ROUNDED_TOLERANCE
    return loaded


def _rounded(x: Tensor, matrix: Matrix) -> Tensor:
    """Return activations as kernels see them that multiply them by blocks, in the order of these."""
    if not isinstance(matrix, Blocks):
        return x
    if matrix.order is None:
        return torch_reference.round_to_int8(x)
    rounded = torch_reference.round_to_int8(x[:, matrix.order])
    return torch.empty_like(x).index_copy_(1, matrix.order, rounded)
