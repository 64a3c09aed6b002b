from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from trio_llm.model.sampling.top_k import argmax, argmax_of_blocks, largest


@pytest.mark.parametrize("vocab_size", [1, 63, 64, 65, 1000, 9000])
@pytest.mark.parametrize("count", [1, 40, 128])
def test_the_largest_are_those_of_torch(vocab_size: int, count: int) -> None:
    """Values equal torch.topk's and stand at the ids returned, for any sizes, ties included."""
    logits = torch.randn(5, vocab_size, generator=torch.Generator().manual_seed(vocab_size)).mul(8).round() / 4
    values, ids = largest(logits, count)
    assert torch.equal(values, logits.topk(min(count, vocab_size)).values)
    assert torch.equal(logits.gather(1, ids), values)
    assert all(len(set(row)) == len(row) for row in ids.tolist())


Largest = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@pytest.mark.parametrize("find", [argmax, argmax_of_blocks])
@pytest.mark.parametrize("vocab_size", [1, 63, 64, 65, 1000])
def test_argmax_takes_the_lowest_id(vocab_size: int, find: Largest) -> None:
    """Among equal logits, all -inf included, the lowest id is the largest."""
    logits = torch.randint(0, 3, (50, vocab_size), generator=torch.Generator().manual_seed(0)).float()
    logits[0] = -torch.inf
    ids, top = find(logits)
    assert torch.equal(ids, logits.argmax(-1))
    assert torch.equal(top, logits.amax(-1))


@pytest.mark.parametrize("find", [argmax, argmax_of_blocks])
def test_nan_is_the_largest(find: Largest) -> None:
    """A NaN anywhere in a row shows in its top, so that the row can be failed."""
    logits = torch.zeros(3, 100)
    logits[1, 99] = torch.nan
    assert find(logits)[1].isnan().tolist() == [False, True, False]
