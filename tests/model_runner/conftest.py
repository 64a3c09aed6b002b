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
    """A checkpoint, prompts for it, and the oracle."""

    directory: Path
    oracle: Any
    prompts: list[list[int]]
    _followed: dict[tuple[int, ...], list[int]] = attrs.field(factory=dict)

    def follow(self, prompt: list[int], output: list[int]) -> list[int]:
        """Return what the oracle finds likeliest after the prompt and after each of the output's tokens but the last.

        An output that equals this is the oracle's own greedy continuation, by induction.
        """
        tokens = tuple(prompt + output)
        if tokens not in self._followed:
            with torch.inference_mode():
                likeliest = self.oracle(input_ids=torch.tensor([tokens])).logits[0].argmax(-1).tolist()
            self._followed[tokens] = likeliest[len(prompt) - 1 : -1]
        return self._followed[tokens]

    def follow_all(self, outputs: list[list[int]]) -> list[list[int]]:
        """Follow the outputs of all prompts, in their order."""
        return [self.follow(prompt, output) for prompt, output in zip(self.prompts, outputs, strict=True)]


def make_prompts() -> list[list[int]]:
    """Return sixteen prompts, the same every time."""
    from tests.model.families import VOCAB

    generator = torch.Generator().manual_seed(11)
    prompts: list[list[int]] = []
    for length in BASE_LENGTHS:
        base = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        other = torch.randint(3, VOCAB, (5,), generator=generator).tolist()
        prompts += [base, base[: length // 2] + other, base[:16] + other[:1], base + other]
    return prompts


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny tensors are slower on many threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Golden]:
    """Return a function from a family's name to its checkpoint and oracle, made once a session."""
    from tests.model.families import make_oracle, save

    @cache
    def make(name: str) -> Golden:
        oracle = make_oracle(name)
        directory = save(oracle, tmp_path_factory.mktemp(name))
        return Golden(directory, oracle, make_prompts())

    return make


@pytest.fixture(scope="session")
def runner_of(golden: Callable[[str], Golden]) -> Callable[..., Runner]:
    """Return a function from a family's name to a runner of its checkpoint."""

    @cache
    def make(name: str, **settings: Any) -> Runner:
        options = {"block_size": 4, "num_kv_blocks": 640, "max_batch_size": 16, **settings}
        return load_runner(EngineConfig(model=str(golden(name).directory), **options))

    return make
