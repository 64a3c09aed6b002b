"""Decodes out of captured graphs are those that run call by call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.model.families import FAMILIES
from tests.model_runner import static_ops
from tests.model_runner.conftest import NUM_GENERATED, Golden
from tests.model_runner.drive import Outcome, Params, run
from tests.model_runner.tape import Tapes
from trio_llm.config import EngineConfig
from trio_llm.messages import SamplingParams
from trio_llm.model import attention_torch, ops_torch
from trio_llm.model.load import load_runner
from trio_llm.model.runner import Runner

Requests = list[tuple[list[int], Params]]


def capture(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> Tapes:
    """Capture a runner's decodes on tapes, with operations that can be captured on a CPU."""
    tapes = Tapes()
    with monkeypatch.context() as patch:
        patch.setattr(attention_torch, "paged_attention", static_ops.paged_attention)
        patch.setattr(ops_torch, "moe", static_ops.moe)
        runner.capture_decodes(tapes.capture)
    return tapes


@pytest.fixture
def captured_of(
    golden: Callable[[str], Golden], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Runner, Tapes]]:
    """Return a function from a family's name to a runner of its own with graphs, and their tapes."""

    def make(name: str, **settings: Any) -> tuple[Runner, Tapes]:
        options = {"block_size": 4, "num_kv_blocks": 640, "max_batch_size": 16, **settings}
        runner = load_runner(EngineConfig(model=str(golden(name).directory), **options))
        return runner, capture(runner, monkeypatch)

    return make


def watched(
    runner: Runner, requests: Requests, monkeypatch: pytest.MonkeyPatch, **ways: Any
) -> tuple[Outcome, list[torch.Tensor]]:
    """Serve requests; return also the logits of every step."""
    logits: list[torch.Tensor] = []
    sample = runner._sampler.sample

    def noted(rows: torch.Tensor, *args: Any) -> Any:
        logits.append(rows.clone())
        return sample(rows, *args)

    with monkeypatch.context() as patch:
        patch.setattr(runner._sampler, "sample", noted)
        return run(runner, requests, **ways), logits


def various(prompts: list[list[int]]) -> Requests:
    """Return requests that end one after another, so that batches shrink through all sizes, padded and not."""
    each = [SamplingParams(temperature=0, max_tokens=NUM_GENERATED + i, ignore_eos=True) for i in range(7)]
    return [(prompt, each[i % 7]) for i, prompt in enumerate(prompts)]


@pytest.mark.parametrize("name", FAMILIES)
def test_replayed_decodes_are_those_of_single_calls(
    golden: Callable[[str], Golden], runner_of: Callable[..., Runner],
    captured_of: Callable[..., tuple[Runner, Tapes]], monkeypatch: pytest.MonkeyPatch, name: str,
) -> None:  # fmt: skip
    """Every family: equal tokens, logits within 1e-4 and equal expert counts, over batches that grow and shrink."""
    requests = various(golden(name).prompts)
    runner, tapes = captured_of(name)
    expected, exact = watched(runner_of(name), requests, monkeypatch)
    outcome, logits = watched(runner, requests, monkeypatch)
    assert outcome.token_ids == expected.token_ids
    assert outcome.num_steps == expected.num_steps == len(exact)
    for one, other in zip(logits, exact, strict=True):
        assert torch.allclose(one, other, atol=1e-4)
    assert sum(tapes.num_replays) > outcome.num_steps - 5
    assert sum(count > 0 for count in tapes.num_replays) >= 2


@pytest.mark.parametrize("name", ["qwen3", "mixtral", "gemma4-26b"])
def test_tokens_that_fill_a_batch_up_are_no_tokens_of_an_expert(
    golden: Callable[[str], Golden], captured_of: Callable[..., tuple[Runner, Tapes]], name: str
) -> None:
    """Three rows in a graph of four count as three."""
