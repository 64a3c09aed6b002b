from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

PROMPT_LENGTHS = (45, 13, 1, 30)
NUM_GENERATED = 12


@attrs.frozen
class Golden:
    """A checkpoint and what transformers makes of it: per prompt the logits [tokens, V] and greedy continuation."""

    directory: Path
    oracle: Any
    prompts: list[list[int]]
    logits: list[Tensor]
    greedy: list[list[int]]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny tensors are slower on many threads, and other tests are running."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Golden]:
    """Return a function from a family's name to its checkpoint and oracle answers, made once a session."""
    from tests.model.families import VOCAB, make_oracle, save

    @cache
    def make(name: str) -> Golden:
        oracle = make_oracle(name)
        directory = save(oracle, tmp_path_factory.mktemp(name))
        generator = torch.Generator().manual_seed(7)
        prompts = [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]
        with torch.inference_mode():
            logits = [oracle(input_ids=torch.tensor([prompt])).logits[0] for prompt in prompts]
            greedy = [_continue(oracle, prompt) for prompt in prompts]
        return Golden(directory, oracle, prompts, logits, greedy)

    return make


def _continue(oracle: Any, prompt: list[int]) -> list[int]:
    """Generate greedily without a cache, so that the oracle's own cache cannot be wrong."""
    tokens = list(prompt)
    for _ in range(NUM_GENERATED):
        tokens.append(int(oracle(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]
