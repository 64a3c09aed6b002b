"""A model split among ranks computes what the whole one does, in every family and format, also if nothing divides."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model import families
from tests.model.families import FAMILIES, VOCAB, save
from tests.model.paged import Paged, load
from tests.parallel.ranks import TIMEOUT_S, in_ranks, load_part, split_logits
from trio_llm.config import EngineConfig
from trio_llm.errors import ConfigError
from trio_llm.model.loading.loader import inspect_model
from trio_llm.model.parallel.group import Group, RanksError

# Sums in another order; logits of these models are between 5 and 60.
TOLERANCE = 1e-4
# A key on the border between two int8 values may be rounded the other way, by a 127th of the largest in its head.
INT8_KV_TOLERANCE = 0.05
LENGTHS, NUM_GENERATED = (45, 13, 1), 8
FORMATS: dict[str, dict[str, Any]] = {
    "int8-kv": {"kv_quantization": True},
    "int8-weights": {"quantization": "int8"},
    "int8-both": {"kv_quantization": True, "quantization": "int8"},
}


def prompts(vocab_size: int = VOCAB) -> list[list[int]]:
    """Return prompts longer and shorter than every window, the same every time."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, vocab_size, (length,), generator=generator).tolist() for length in LENGTHS]


def difference(directory: Path, size: int, meeting_place: Path, chunk: int, **settings: Any) -> float:
    """Return the largest difference of a logit between one rank and several, over prompts and greedy outputs.

    The outputs are those of one rank; where several choose another token, the difference is infinite.
    """
    asked = prompts()
    whole = load(directory, **settings)
    outputs = Paged(whole, len(asked)).greedy(asked, chunk, NUM_GENERATED)
    texts = [prompt + output for prompt, output in zip(asked, outputs, strict=True)]
    expected = torch.cat(Paged(whole, len(asked)).prefill(texts, chunk))
    found = split_logits(directory, size, meeting_place, texts, chunk, **settings)
    chosen = [logits.argmax(-1).tolist() for logits in found.split([len(text) for text in texts])]
    for prompt, output, tokens in zip(asked, outputs, chosen, strict=True):
        if tokens[len(prompt) - 1 : -1] != output:
            return torch.inf
    return float((found - expected).abs().nan_to_num(nan=torch.inf).max())


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_the_same_on_several_ranks(
    checkpoint: Callable[[str], Path], tmp_path: Path, family: str, size: int
) -> None:
    """In float32, logits differ by rounding and greedy tokens do not; with four ranks, KV heads are shared."""
    assert difference(checkpoint(family), size, tmp_path / "ranks", chunk=7) < TOLERANCE


@pytest.mark.parametrize(("quantized", "size"), [("int8-kv", 2), ("int8-weights", 2), ("int8-both", 4)])
@pytest.mark.parametrize("family", ["llama-biases-linear-rope", "qwen2-window", "mixtral", "gemma4-e2b", "gemma4-26b"])
def test_int8_is_split_with_the_scales_of_the_whole(
    checkpoint: Callable[[str], Path], tmp_path: Path, family: str, quantized: str, size: int
) -> None:
    """Weights have the scale of their whole row on every rank. KV scales belong to a head, which has one rank."""
    tolerance = TOLERANCE if quantized == "int8-weights" else INT8_KV_TOLERANCE
    settings = FORMATS[quantized]
    assert difference(checkpoint(family), size, tmp_path / "ranks", chunk=16, **settings) < tolerance


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("moe", [False, True])
def test_what_does_not_divide_is_padded(tmp_path: Path, size: int, moe: bool) -> None:
    """Vocabulary and widths of odd sizes: the last rank has fewer entries, and the logits have no padding."""
    torch.manual_seed(3)
    odd = {"vocab_size": 125, "intermediate_size": 77}
    oracle = families._qwen3_moe(**odd, moe_intermediate_size=37) if moe else families._llama(**odd, mlp_bias=True)
    directory = save(oracle.float().eval(), tmp_path / "model")
    asked = prompts(125)
    expected = torch.cat(Paged(load(directory), len(asked)).prefill(asked, 16))
    found = split_logits(directory, size, tmp_path / "ranks", asked, 16)
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) < TOLERANCE


def test_random_weights_are_those_of_the_same_model(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """--load-format dummy gives every rank its part of the weights that one rank would have."""
    assert difference(checkpoint("qwen3"), 2, tmp_path / "ranks", chunk=16, load_format="dummy") < TOLERANCE


@pytest.mark.parametrize("family", ["llama", "qwen3-moe", "gemma4-e2b", "gemma4-26b"])
def test_each_rank_holds_its_part_only(checkpoint: Callable[[str], Path], family: str) -> None:
    """Two ranks hold one model, apart from norms, routers and Gemma's per-layer projections, which each of them has."""
    directory = checkpoint(family)
    whole = inspect_model(EngineConfig(model=str(directory)))
    parts = [inspect_model(EngineConfig(model=str(directory), tensor_parallel_size=2), rank=rank) for rank in (0, 1)]
    assert parts[0].weight_bytes == parts[1].weight_bytes == load_part(directory, Group(0, 2)).plan.weight_bytes
    assert 0.5 <= parts[0].weight_bytes / whole.weight_bytes < 0.6
    assert parts[0].kv_layout.block_bytes * 2 == whole.kv_layout.block_bytes
    assert 0.5 <= parts[0].stored_bytes / whole.stored_bytes < 0.6


@pytest.mark.parametrize(
    ("family", "size", "says"),
    [
        ("llama", 3, "tensor_parallel_size = 3: does not divide 4 attention heads and 4 KV heads"),
        ("qwen3", 8, "tensor_parallel_size = 8: does not divide 4 attention heads and 2 KV heads"),
    ],
)
def test_heads_that_the_ranks_do_not_divide_are_refused(
    checkpoint: Callable[[str], Path], family: str, size: int, says: str
) -> None:
    """The refusal says how many heads and how many ranks there are, before a weight is read."""
    with pytest.raises(ConfigError, match=says):
        inspect_model(EngineConfig(model=str(checkpoint(family)), tensor_parallel_size=size))


def test_ranks_have_the_same_bits_after_a_sum(tmp_path: Path) -> None:
    """Routing and norms are computed on each rank from what `all_reduce` returns, so it must not differ."""

    def work(group: Group) -> torch.Tensor:
        generator = torch.Generator().manual_seed(group.rank)
        return group.all_reduce(torch.randn(1001, generator=generator))

    parts = in_ranks(4, tmp_path / "ranks", work)
    assert all(part.equal(parts[0]) for part in parts)


def test_an_error_keeps_no_connection(tmp_path: Path) -> None:
    """What failed may be kept and looked at: torch frees a connection's store by its path, which must not be later."""
    gone = threading.Barrier(2)

    def work(group: Group) -> tuple[BaseException | None, object]:
        kept, error = weakref.ref(group._processes), None
        if group.rank:
            group.disconnect()
        gone.wait(TIMEOUT_S)
        if group.rank == 0:
            with pytest.raises(RanksError) as caught:
                group.all_reduce(torch.ones(2))
            error = caught.value
            group.disconnect()
        return error, kept()

    (error, kept), _ = in_ranks(2, tmp_path / "ranks", work)
    assert isinstance(error, RanksError)
    assert error.__traceback__ is not None
    assert kept is None


def test_a_group_that_is_not_connected_says_so() -> None:
    """A collective of several ranks without a connection is an error, not a wrong sum."""
    with pytest.raises(RanksError, match="not connected"):
        Group(0, 2).all_reduce(torch.ones(2))
