"""Greedy tokens of whole models through the real scheduler, block manager and runner, against transformers."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.model_runner.conftest import NUM_GENERATED, Golden
from tests.model_runner.drive import least_blocks, run
from trio_llm.model.runner import Runner
from trio_llm.params import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=NUM_GENERATED, ignore_eos=True)
WHOLE = 0
# Every family through every setting would take minutes: the plain families see all, the others a selection of pairs.
PLAIN = ("llama3-rope-gqa-tied", "qwen2", "qwen3")
OTHERS = (
    "qwen2-window",
    "mistral",
    "mistral-window",
    "mixtral",
    "gemma4-e2b",
    "gemma4-26b",
    "gemma4-31b",
)
SIZES = {1: (5, 16), 7: (1, 16), 16: (5, 16), WHOLE: (1, 16)}
SELECTION = ((False, WHOLE, 2), (True, 1, 16), (True, 7, 4), (False, 7, 16), (True, 16, 16))
MATRIX = [
    *[
        (name, caching, chunk, size)
        for name in PLAIN
        for caching in (False, True)
        for chunk, sizes in SIZES.items()
        for size in sizes
    ],
    *[(name, *setting) for name in OTHERS for setting in SELECTION],
]


@pytest.mark.parametrize(("name", "caching", "chunk", "batch_size"), MATRIX)
def test_greedy_tokens_are_those_of_transformers(
    golden: Callable[[str], Golden],
    runner_of: Callable[..., Runner],
    name: str,
    caching: bool,
    chunk: int,
    batch_size: int,
) -> None:
    """Prefix caching, chunking and batching change no token; prompts are longer than the windows."""
    expected = golden(name)
    outcome = run(
        runner_of(name),
        [(prompt, GREEDY) for prompt in expected.prompts],
        caching=caching,
        chunk=chunk,
        batch_size=batch_size,
    )
    assert outcome.token_ids == expected.follow_all(outcome.token_ids)
    assert {len(token_ids) for token_ids in outcome.token_ids} == {NUM_GENERATED}
    assert (outcome.hit_tokens > 0) == caching or batch_size == 16


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("name", [*PLAIN, *OTHERS])
def test_preemption_changes_no_token(
    golden: Callable[[str], Golden], runner_of: Callable[..., Runner], name: str, caching: bool
) -> None:
    """A pool too small for the batch throws sequences out in the middle; their output is the same."""
    expected = golden(name)
    runner = runner_of(name)
    num_blocks = least_blocks(runner, 61, chunk=7) + 8
    outcome = run(runner, [(p, GREEDY) for p in expected.prompts], caching=caching, chunk=7, num_blocks=num_blocks)
    assert outcome.num_preempted > 0
    assert outcome.token_ids == expected.follow_all(outcome.token_ids)
    assert {len(token_ids) for token_ids in outcome.token_ids} == {NUM_GENERATED}
