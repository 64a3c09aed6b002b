"""Whole models whose long prefills attend by torch, through the real scheduler and on a pretended GPU's start."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model_runner import rows_in_torch
from tests.model_runner.conftest import Golden
from tests.model_runner.drive import run
from tests.model_runner.rows_in_torch import kernel_in_torch, long_from
from tests.model_runner.test_golden_engine import GREEDY, OTHERS, PLAIN
from tests.model_runner.test_gpu_loading import PEAK, PretendedGpu, directory, gpu, settings
from trio_llm.config import EngineConfig
from trio_llm.messages import StepPlan, StepResult
from trio_llm.model import load as loading
from trio_llm.model.load import load_runner
from trio_llm.model.loading import pool_size
from trio_llm.model.ops import long_prefills
from trio_llm.model.runner import Runner

__all__ = ["directory", "gpu"]


@pytest.fixture
def long_by_torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take prefills of five tokens and more to torch, on a CPU in float32."""
    monkeypatch.setattr(loading, "_KERNELS", {"cpu": rows_in_torch.__name__})
    with kernel_in_torch(), long_from(5):
        yield


def counted(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, str]]:
    """Return the calls of attention of all later steps by implementation and reason."""
    calls: Counter[tuple[str, str]] = Counter()
    step = runner.step

    def watched(plan: StepPlan) -> StepResult:
        result = step(plan)
        for _, implementation, reason, count in result.kernel_calls or ():
            calls[implementation, reason] += count
        return result

    monkeypatch.setattr(runner, "step", watched)
    return calls


@pytest.mark.parametrize(("caching", "chunk"), [(False, 0), (True, 7)])
@pytest.mark.parametrize("name", [*PLAIN, *OTHERS])
def test_greedy_tokens_are_those_of_transformers(
    golden: Callable[[str], Golden],
    long_by_torch: None,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    caching: bool,
    chunk: int,
) -> None:
    """Whole prompts, and chunks after cached prefixes beside decodes: every family says the same."""
    expected = golden(name)
    options: dict[str, Any] = {"block_size": 4, "num_kv_blocks": 640, "max_batch_size": 16}
    runner = load_runner(EngineConfig(model=str(expected.directory), **options))
    calls = counted(runner, monkeypatch)
    outcome = run(runner, [(p, GREEDY) for p in expected.prompts], caching=caching, chunk=chunk, batch_size=5)
    assert outcome.token_ids == expected.follow_all(outcome.token_ids)
    ways = {("cuda", ""), ("torch", "long prefills"), ("torch", "long prefills, the kernel for other rows")}
    assert calls.keys() <= ways
    assert calls["torch", "long prefills, the kernel for other rows"] > 0 and calls["cuda", ""] > 0


@pytest.mark.parametrize("mode", ["auto", "cuda", "reference"])
@pytest.mark.parametrize("longest", [None, 64])
def test_a_gpu_chooses_at_start_and_keeps_memory_to_gather(
    directory: Path, gpu: PretendedGpu, monkeypatch: pytest.MonkeyPatch, mode: str, longest: int | None
) -> None:
    """Before steps are measured; keys and values of the longest context are taken off. Without kernels nobody asks."""
    monkeypatch.setenv("TRIO_LLM_KERNELS", mode)
    monkeypatch.setattr(loading, "find_kernels", lambda *_: rows_in_torch)
    shape = long_prefills.Shape(gpu.torch_device, 4, 2, 16, torch.bfloat16)
    asked: list[tuple[Any, ...]] = []

    def choose(*args: Any) -> None:
        asked.append(args)
        monkeypatch.setitem(long_prefills.limits, shape, 64)

    monkeypatch.setattr(pool_size, "choose_prefills", choose)
    with kernel_in_torch():
        runner = load_runner(settings(directory, enforce_eager=True, max_model_len=longest))
    assert runner.budget.workspace_bytes == PEAK + (0 if mode == "reference" else (longest or 256) * 2 * 2 * 16 * 2)
    assert len(asked) == (mode != "reference")
    for layout, dtype, kernels, device, most_tokens in asked:
        assert (layout.specs[0].head_dim, dtype, device, most_tokens) == (16, torch.bfloat16, gpu, 64)
        assert kernels is rows_in_torch
