"""Where a prompt leaves what is cached."""

from __future__ import annotations

import pytest

from tests.core.loop import HYBRID, TWO_SIZES, Loop
from trio_llm.core.prefix import Difference
from trio_llm.model_info import KVGroup
from trio_llm.params import SamplingParams

ONE = SamplingParams(max_tokens=1, ignore_eos=True)
CACHED = tuple(range(12))


def admitted(loop: Loop, prompt: tuple[int, ...], **options: object) -> int:
    """Submit a prompt, run its first step, and return its id."""
    request_id = loop.submit(prompt, SamplingParams(max_tokens=9), **options)
    loop.step()
    return request_id


@pytest.mark.parametrize("groups", [(KVGroup((0,), 4),), HYBRID, TWO_SIZES])
def test_the_first_token_that_differs_is_found(groups: tuple[KVGroup, ...]) -> None:
    """It may be the first of the block after the cached prefix, one inside it, or the first of all."""
    size = min(group.block_size for group in groups)
    for at in range(len(CACHED) - 1):
        loop = Loop(groups, num_blocks=80)
        loop.submit(CACHED, ONE)
        loop.run()
        prompt = (*CACHED[:at], 50, *CACHED[at + 1 :])
        num_cached = at - at % max(group.block_size for group in groups)
        found = loop.blocks.difference(admitted(loop, prompt), num_cached)
        # Beyond the block after the cached prefix, nothing is compared.
        end = num_cached + size
        if at < end:
            assert found == Difference(at, prompt[at:end], CACHED[at:end])
        else:
            assert found is None


def test_nothing_else_in_the_cache_means_no_difference() -> None:
    """Not if the prompt goes on as what is cached, if nothing begins alike, or if another salt does."""
    loop = Loop(num_blocks=80)
    loop.submit(CACHED, ONE)
    loop.run()
    assert loop.blocks.difference(admitted(loop, CACHED), 8) is None
    assert loop.blocks.difference(admitted(loop, (*CACHED[:8], 50, 51, 52, 53), salt=b"other"), 0) is None


def test_a_block_that_is_evicted_is_no_difference() -> None:
    """What the cache forgot is not compared with."""
    loop = Loop(num_blocks=6)
    loop.submit(CACHED, ONE)
    loop.run()
    loop.submit(tuple(range(30, 48)), ONE)
    loop.run()
    assert loop.blocks.difference(admitted(loop, (*CACHED[:2], 50, 51, 52, 53)), 0) in (
        None,
        Difference(0, (0, 1, 50, 51), (30, 31, 32, 33)),
    )


def test_a_long_difference_is_cut() -> None:
    """However large a block is, 32 tokens are shown."""
    loop = Loop((KVGroup((0,), 64),), num_blocks=8, budget=200, max_model_len=150)
    loop.submit(tuple(at % 50 for at in range(100)), ONE)
    loop.run()
    found = loop.blocks.difference(admitted(loop, (51,) * 70), 0)
    assert found is not None
    assert (found.position, len(found.token_ids), len(found.cached_token_ids)) == (0, 32, 32)
