"""Embeddings: the hidden states of a prompt, gathered over its chunks, become one vector.

Letters: S tokens of a chunk, H hidden size.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet

import attrs
import torch
from torch import Tensor

from trio_llm.messages import Admission
from trio_llm.params import PoolingParams


@attrs.frozen(eq=False)
class _Prompt:
    """One pooling sequence. `sums` are keyed by the chunk's start, so that a repeated step counts once."""

    params: PoolingParams
    num_tokens: int
    sums: dict[int, tuple[int, Tensor]]


class Pooler:
    """Holds the unfinished vectors by row; shares no state with generation."""

    def __init__(self) -> None:
        self._prompts: dict[int, _Prompt] = {}

    @property
    def rows(self) -> AbstractSet[int]:
        return self._prompts.keys()

    def admit(self, row: int, admission: Admission, params: PoolingParams) -> None:
        self._prompts[row] = _Prompt(params, len(admission.token_ids), {})

    def forget(self, row: int) -> None:
        self._prompts.pop(row, None)

    def add(self, row: int, start: int, hidden: Tensor) -> Tensor | None:
        """Add a chunk's hidden states [S, H]; return the vector [H] once the prompt is complete."""
        prompt = self._prompts[row]
        end = start + len(hidden)
        if prompt.params.pooling == "last":
            return _finish(hidden[-1].float(), prompt.params) if end == prompt.num_tokens else None
        prompt.sums[start] = len(hidden), hidden.sum(0, dtype=torch.float32)
        if end < prompt.num_tokens:
            return None
        assert sum(count for count, _ in prompt.sums.values()) == prompt.num_tokens, "a chunk was not computed here"
        total = torch.stack([part for _, part in prompt.sums.values()]).sum(0)
        return _finish(total / prompt.num_tokens, prompt.params)


def _finish(vector: Tensor, params: PoolingParams) -> Tensor:
    """Shorten, then normalise, as models trained for several sizes (Matryoshka, arXiv:2205.13147) expect."""
    vector = vector[: params.dimensions]
    return vector / vector.norm().clamp_min(1e-12) if params.normalize else vector
