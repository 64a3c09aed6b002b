from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.model.families import FAMILIES
from tests.model.golden import CHUNKS, FP32_TOLERANCE, NUM_GENERATED, Golden, make_golden, max_difference
from tests.model.paged import Paged, load


@pytest.mark.parametrize("name", FAMILIES)
def test_float32_logits_equal_transformers(name: str, golden: Callable[[str], Golden]) -> None:
    """Every prompt token's logits are within 1e-4 of transformers, however the prompts are cut into ragged steps."""
    case = golden(name)
    loaded = load(case.directory)
    assert [max_difference(loaded, case, chunk) < FP32_TOLERANCE for chunk in CHUNKS] == [True] * len(CHUNKS)


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_equal_transformers(name: str, golden: Callable[[str], Golden]) -> None:
    """Greedy continuations, decoded in one batch past every window, are transformers' token for token."""
    case = golden(name)
    paged = Paged(load(case.directory), len(case.prompts))
    assert paged.greedy(case.prompts, 7, NUM_GENERATED) == case.greedy


@pytest.mark.parametrize("name", ["llama3-rope-gqa-tied", "mixtral", "gemma4-wrapper"])
def test_sharded_checkpoints_load_the_same(name: str, tmp_path: Path) -> None:
    """A checkpoint cut into many shards with an index gives the oracle's logits too."""
    case = make_golden(name, tmp_path, shard_bytes=40_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert max_difference(load(tmp_path), case, 16) < FP32_TOLERANCE


@pytest.mark.parametrize("name", ["qwen3", "mistral-window", "mixtral", "gemma4-e2b", "gemma4-26b"])
def test_a_row_does_not_depend_on_its_batch_mates(name: str, golden: Callable[[str], Golden]) -> None:
    """A prompt alone has the logits it has among decodes and other prompts, up to float noise."""
    case = golden(name)
    loaded = load(case.directory)
    alone = Paged(loaded, 1).prefill([case.prompts[0]], 16)[0]
    crowd = Paged(loaded, 12, seed=3)
    together = crowd.prefill([case.prompts[0], *[case.prompts[3]] * 11], 16)
    assert (alone - together[0]).abs().max() < FP32_TOLERANCE
    assert all((together[1] - other).abs().max() < FP32_TOLERANCE for other in together[2:])


@pytest.mark.parametrize("block_size", [1, 16])
def test_block_size_does_not_matter(block_size: int, golden: Callable[[str], Golden]) -> None:
    """Blocks of one token, and blocks larger than the window, give the oracle's logits."""
    case = golden("gemma4-e2b")
    assert max_difference(load(case.directory, block_size=block_size), case, 7) < FP32_TOLERANCE


@pytest.mark.parametrize("count", [2, 5, 8, 9])
def test_decoded_and_drafted_rows_share_a_batch(count: int, golden: Callable[[str], Golden]) -> None:
    """Rows that check several tokens at once, beside rows of one, get the logits of a whole prefill."""
    case = golden("mistral-window")
    paged = Paged(load(case.directory), 3)
    prompt = case.prompts[0]
    paged.prefill([prompt[:30], prompt[:20], prompt[:25]], None)
    rows = [(0, prompt[30 : 30 + count]), (1, prompt[20:21]), (2, prompt[25 : 25 + count])]
    for (sequence, tokens), got in zip(rows, paged.step(rows), strict=True):
        end = paged.lengths[sequence]
        assert (got - case.logits[0][end - len(tokens) : end]).abs().max() < FP32_TOLERANCE
