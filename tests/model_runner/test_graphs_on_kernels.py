"""Decode graphs of CUDA kernels: the launches themselves are captured, and replayed in the simulator."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch

from cuda_kernels.launch import using
from tests.kernels.test_models_on_kernels import MODELS
from tests.model import families
from tests.model_runner.drive import poison
from tests.model_runner.tape import Tapes
from tests.model_runner.test_runner import GREEDY
from tools.ptx_simulator import SimulatedLauncher
from trio_llm.config import EngineConfig
from trio_llm.messages import UNKNOWN, Admission, StepPlan, StepResult
from trio_llm.model import load as loading
from trio_llm.model.load import load_runner
from trio_llm.model.ops import cuda as ops_cuda
from trio_llm.model.runner import Runner
from trio_llm.model.step import decode_graphs

PROMPTS = ((9, 8, 7, 6, 5, 4, 3, 2, 11, 12, 13, 14, 15, 16, 17), (21, 22), (31, 32, 33))


@pytest.fixture
def on_kernels(monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    """Run the CUDA kernels on CPU tensors, simulated, and capture one graph of four rows."""
    monkeypatch.setattr(loading, "_KERNELS", {"cpu": ops_cuda.__name__})
    monkeypatch.setattr(decode_graphs, "graph_sizes", lambda most: [most])
    with using(SimulatedLauncher()):
        yield


def serve(runner: Runner, logits: list[torch.Tensor]) -> list[StepResult]:
    """Compute three prompts and three tokens of each, the first sequence crossing from one block to the next."""
    sample = runner._sampler.sample

    def noted(rows: torch.Tensor, *args: Any) -> Any:
        logits.append(rows.clone())
        return sample(rows, *args)

    runner._sampler.sample = noted  # type: ignore[method-assign]
    poison(runner)
    groups = len(runner.info.kv_groups)
    firsts = [[1 + 2 * (i * groups + group) for group in range(groups)] for i in range(3)]
    blocks = tuple(tuple((0, (first, first + 1)) for first in row) for row in firsts)
    admitted = tuple(Admission(i, prompt, len(prompt), GREEDY) for i, prompt in enumerate(PROMPTS))
    lengths, samples = tuple(map(len, PROMPTS)), (True,) * 3
    plan = StepPlan(1, (), admitted, (0, 1, 2), (0,) * 3, lengths, sum(PROMPTS, ()), samples, blocks)
    waiting = [runner.launch(plan)]
    for step in range(3):
        starts = tuple(length + step for length in lengths)
        plan = StepPlan(step + 2, (), (), (0, 1, 2), starts, (1,) * 3, (UNKNOWN,) * 3, samples, ((),) * 3)
        waiting.append(runner.launch(plan))
    return [collect() for collect in waiting]


def compare(eager: Runner, graphed: Runner) -> None:
    """Serve with both: equal tokens, logits within bfloat16's rounding, equal calls and expert counts; no fallback."""
    expected_logits: list[torch.Tensor] = []
    logits: list[torch.Tensor] = []
    expected, results = serve(eager, expected_logits), serve(graphed, logits)
    for one, other in zip(results, expected, strict=True):
        assert one.token_ids == other.token_ids
        assert one.expert_tokens == other.expert_tokens
        calls = {(op, where): count for op, where, _, count in one.kernel_calls or () if op != "prepare_decodes"}
        assert calls == {(op, where): count for op, where, _, count in other.kernel_calls or ()}
        assert {where for _, where in calls} <= {"cuda", "cublas"}
    for row, wanted in zip(logits, expected_logits, strict=True):
        assert torch.allclose(row, wanted, atol=0.03 * wanted.abs().max().item())


CASES: list[tuple[str, dict[str, Any]]] = [
    ("mixtral", {}),
    ("llama", {"kv_quantization": True}),
    ("qwen3", {}),
    ("gemma4", {"kv_quantization": True}),
]


def settings(name: str, directory: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> EngineConfig:
    """Write a checkpoint that kernels take, and return settings to serve it."""
    monkeypatch.setitem(families.FAMILIES, "on-kernels", MODELS[name])
    families.save(families.make_oracle("on-kernels"), directory)
    return EngineConfig(
        model=str(directory), dtype="bfloat16", num_kv_blocks=32, max_batch_size=4, max_model_len=48, **options
    )


@pytest.mark.parametrize(
    ("name", "options"), [*CASES[:2], *(pytest.param(*case, marks=pytest.mark.kernels_full) for case in CASES[2:])]
)
def test_replayed_kernels_do_what_launched_ones_do(
    name: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_kernels: None
) -> None:
    """Three rows in a graph of four, the fourth of which goes to no expert."""
    config = settings(name, tmp_path, monkeypatch, **options)
    eager, graphed = load_runner(config), load_runner(config)
    tapes = Tapes()
    graphed.capture_decodes(tapes.capture)
    compare(eager, graphed)
    assert tapes.num_replays == [3]
