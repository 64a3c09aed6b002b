"""A checkpoint beside what transformers makes of it, and how far our paged path is from that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from tests.model.families import VOCAB, make_oracle, save
from tests.model.paged import Paged
from trio_llm.model.loading.loader import LoadedModel

PROMPT_LENGTHS = (45, 13, 1, 30)
NUM_GENERATED = 12
CHUNKS = (None, 1, 7, 16)
FP32_TOLERANCE = 1e-4


@attrs.frozen(eq=False)
class Golden:
    """Per prompt the oracle's logits [tokens, V] and greedy continuation.

    The oracle generates without a cache, so that no cache of its own can be wrong.
    """

    directory: Path
    oracle: Any
    prompts: list[list[int]]
    logits: list[Tensor]
    greedy: list[list[int]]


def make_golden(name: str, directory: Path, *, shard_bytes: int | None = None) -> Golden:
    """Save a family's checkpoint and ask the oracle."""
    oracle = make_oracle(name)
    save(oracle, directory, shard_bytes=shard_bytes)
    generator = torch.Generator().manual_seed(7)
    prompts = [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]
    logits, greedy = [], []
    with torch.inference_mode():
        for prompt in prompts:
            logits.append(oracle(input_ids=torch.tensor([prompt])).logits[0])
            tokens = list(prompt)
            for _ in range(NUM_GENERATED):
                tokens.append(int(oracle(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
            greedy.append(tokens[len(prompt) :])
    return Golden(directory, oracle, prompts, logits, greedy)


def paged_logits(loaded: LoadedModel, golden: Golden, chunk: int | None) -> Tensor:
    """Run all prompts as one ragged batch; return the logits of all their tokens."""
    return torch.cat(Paged(loaded, len(golden.prompts)).prefill(golden.prompts, chunk))


def max_difference(loaded: LoadedModel, golden: Golden, chunk: int | None) -> float:
    """Return the largest |logit difference| over all prompts; NaN counts as infinite."""
    difference = (paged_logits(loaded, golden, chunk) - torch.cat(golden.logits)).abs()
    return float(difference.nan_to_num(nan=torch.inf).max())
