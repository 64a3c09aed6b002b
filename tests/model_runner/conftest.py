from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

from trio_llm.config import EngineConfig
from trio_llm.model.load import load_runner
from trio_llm.model.runner import Runner

NUM_GENERATED = 10
# Longer than every window (8) but for the last; 16 prompts in all, each base also cut short and continued otherwise,
# so that they share prefixes that end inside a block, at its border and in between.
BASE_LENGTHS = (45, 21, 30, 1)


@attrs.frozen
class Golden:
    """A checkpoint, prompts, and the oracle's greedy continuations of them."""

    directory: Path
    oracle: Any
    prompts: list[list[int]]
    greedy: list[list[int]]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny tensors are slower on many threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Golden]:
    """Return a function from a family's name to its checkpoint and the oracle's answers, made once a session."""
    from tests.model.families import VOCAB, make_oracle, save

    @cache
    def make(name: str) -> Golden:
        oracle = make_oracle(name)
        generator = torch.Generator().manual_seed(11)
        prompts: list[list[int]] = []
        for length in BASE_LENGTHS:
            base = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
            other = torch.randint(3, VOCAB, (5,), generator=generator).tolist()
            prompts += [base, base[: length // 2] + other, base[:16] + other[:1], base + other]
        directory = save(oracle, tmp_path_factory.mktemp(name))
        return Golden(directory, oracle, prompts, [_continue(oracle, prompt) for prompt in prompts])

    return make


@torch.inference_mode()
def _continue(oracle: Any, prompt: list[int]) -> list[int]:
    """Generate greedily without a cache, so that the oracle's own cache cannot be wrong."""
    tokens = list(prompt)
    for _ in range(NUM_GENERATED):
        tokens.append(int(oracle(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.fixture(scope="session")
def runner_of(golden: Callable[[str], Golden]) -> Callable[..., Runner]:
    """Return a function from a family's name to a runner of its checkpoint."""

    @cache
    def make(name: str, **settings: Any) -> Runner:
        options = {"block_size": 4, "num_kv_blocks": 640, "max_batch_size": 16, **settings}
        return load_runner(EngineConfig(model=str(golden(name).directory), **options))

    return make
