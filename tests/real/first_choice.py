"""How far the tokens of an answer are from the first choice of a reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def behind(logits: Tensor, prompt: Sequence[int], answer: Sequence[int]) -> float:
    """Return by how much a token of the answer is less likely than the first choice, in logits, at most.

    Args:
        logits: [S, V], of the reference for prompt and answer, and perhaps what follows.
    """
    rows = logits[len(prompt) - 1 :][: len(answer)]
    return float((rows.amax(-1) - rows.gather(1, torch.tensor(answer)[:, None])[:, 0]).max())
