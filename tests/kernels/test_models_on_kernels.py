"""Whole models through the seam, every operation on its CUDA kernel, simulated, against transformers."""

from __future__ import annotations

import logging
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch

from cuda_kernels import sample
from cuda_kernels.launch import using
from tests.model import families
from tests.model.golden import make_golden
from tests.model.paged import Paged, load
from tests.model.test_reduced_precision import errors
from tests.model_runner.drive import run
from tools.ptx_simulator import SimulatedLauncher
from trio_llm.config import EngineConfig
from trio_llm.errors import ConfigError, UnsupportedError
from trio_llm.messages import KernelCall, StepPlan, StepResult
from trio_llm.model import load as loading
from trio_llm.model.load import load_runner
from trio_llm.model.ops import cuda as ops_cuda
from trio_llm.model.ops import dispatch
from trio_llm.model.ops import seam as ops
from trio_llm.model.ops import torch_reference as ops_torch
from trio_llm.model.ops.dispatch import Dispatch, dispatching, mode_from_environment
from trio_llm.params import SamplingParams

SHAPE = {"head_dim": 64, "hidden_size": 64, "num_hidden_layers": 2}
MODELS: dict[str, Any] = {
    "qwen3": lambda: families._qwen3(**SHAPE),
    "llama": lambda: families._llama(**SHAPE, attention_bias=True, rope_parameters=families.LLAMA3),
    "gemma4": lambda: families._gemma4(
        **{**SHAPE, "num_hidden_layers": 3}, layer_types=families.HYBRID, global_head_dim=128, **families.K_EQ_V
    ),
    "mixtral": lambda: families._mixtral(**SHAPE, intermediate_size=64),
    "head-size-80": lambda: families._mistral(**{**SHAPE, "head_dim": 80}, sliding_window=16),
    "head-size-96": lambda: families._llama(**{**SHAPE, "head_dim": 96}),
}
CASES = [
    ("mixtral", {}),
    ("llama", {"kv_quantization": True, "quantization": "int8"}),
    ("llama", {"kv_cache_dtype": "fp8", "quantization": "int8"}),
    ("head-size-80", {"quantization": "int8"}),
    ("head-size-96", {"kv_quantization": True, "quantization": "int8"}),
    pytest.param("mixtral", {"quantization": "int8"}, marks=pytest.mark.kernels_full),
    pytest.param("qwen3", {}, marks=pytest.mark.kernels_full),
    pytest.param("gemma4", {}, marks=pytest.mark.kernels_full),
]


@pytest.fixture
def on_kernels(monkeypatch: pytest.MonkeyPatch) -> Generator[Dispatch]:
    """Run the CUDA kernels on CPU tensors, simulated, and tell what ran where."""
    monkeypatch.setattr(loading, "_KERNELS", {"cpu": ops_cuda.__name__})
    monkeypatch.setattr(dispatch, "_logged", set())
    counting = Dispatch(kernels=ops_cuda, device_type="cpu")
    with using(SimulatedLauncher()), dispatching(counting):
        yield counting


@pytest.mark.parametrize(("name", "settings"), CASES, ids=str)
def test_models_match_transformers(
    name: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_kernels: Dispatch
) -> None:
    """Ragged chunks and decodes give the oracle's logits within what bfloat16 costs, and nothing fell back."""
    monkeypatch.setitem(families.FAMILIES, "on-kernels", MODELS[name])
    golden = make_golden("on-kernels", tmp_path)
    paged = Paged(load(tmp_path, block_size=16, dtype="bfloat16", **settings), 3)
    a, b, c = golden.prompts[1], golden.prompts[2], golden.prompts[3]
    first = paged.step([(0, a[:9]), (1, b), (2, c[:20])])
    second = paged.step([(0, a[9:10]), (2, c[20:21])])
    got = torch.cat([*first, *second])
    want = torch.cat([golden.logits[1][:9], golden.logits[2], golden.logits[3][:20],
                      golden.logits[1][9:10], golden.logits[3][20:21]])  # fmt: skip
    rms, kl = errors(want, got)
    if name == "mixtral":  # where two experts are nearly equal, rounding picks the other one
        assert kl < 0.03
    else:
        assert rms < 0.12 and kl < 0.006
    assert {implementation for _, implementation, _ in on_kernels.calls} <= {"cuda", "cublas"}
    used = {op for op, implementation, _ in on_kernels.calls if implementation == "cuda"}
    own = {
        "gemma4": {"rms_norm", "gated_linear"}, "mixtral": {"route", "moe", "add_rms_norm"},
        "qwen3": {"normed_linear", "add_rms_norm"},  # gates of many rows are cuBLAS's
    }  # fmt: skip
    assert used >= {"linear", "write_kv", "paged_attention"} | own.get(name, {"gated_linear", "add_rms_norm"})
    assert ("quantize_rows" in used) == ("quantization" in settings)


def test_a_runner_says_what_its_steps_ran_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_kernels: Dispatch
) -> None:
    """Every operation of a step, sampling with edits and log-probabilities included, runs on a kernel and counts."""
    monkeypatch.setattr(sample, "THREADS", 64)
    monkeypatch.setitem(families.FAMILIES, "on-kernels", lambda: families._llama(**{**SHAPE, "num_hidden_layers": 1}))
    golden = make_golden("on-kernels", tmp_path)
    settings: dict[str, Any] = {"dtype": "bfloat16", "block_size": 16, "num_kv_blocks": 16, "max_batch_size": 4}
    runner = load_runner(EngineConfig(model=str(tmp_path), **settings))
    calls: list[KernelCall] = []
    step = runner.step

    def watched(plan: StepPlan) -> StepResult:
        result = step(plan)
        calls.extend(result.kernel_calls or ())
        return result

    monkeypatch.setattr(runner, "step", watched)
    greedy = SamplingParams(temperature=0, max_tokens=1, logprobs=0)
    edited = SamplingParams(seed=1, top_p=0.9, max_tokens=1, repetition_penalty=1.2, allowed_token_ids=(5, 6, 7))
    outcome = run(runner, [(golden.prompts[0][:5], greedy), (golden.prompts[1][:3], edited)])
    assert all(len(answer.token_ids) == 1 and answer.error is None for answer in outcome.answers)
    assert set(outcome.answers[1].token_ids) <= {5, 6, 7}
    assert {(implementation, reason) for _, implementation, reason, _ in calls} == {("cuda", "")}
    counted = {op: sum(count for name, *_, count in calls if name == op) for op, *_ in calls}
    assert {counted[op] for op in ("sample", "token_logprobs", "write_kv", "paged_attention")} == {1}
    assert not on_kernels.calls  # a runner counts for itself


def test_a_fallback_is_said_once_and_counted(on_kernels: Dispatch, caplog: pytest.LogCaptureFixture) -> None:
    """What no kernel takes runs on the reference; the log says so once, the counter every time until it is read."""
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            out = ops.act_and_mul(torch.ones(1, 32), "silu")
    assert torch.equal(out, ops_torch.act_and_mul(torch.ones(1, 32), "silu"))
    assert [r.message for r in caplog.records] == [
        "no kernel does act_and_mul with dtype torch.float32: the torch reference runs"
    ]
    assert on_kernels.take() == (("act_and_mul", "reference", "dtype torch.float32", 3),)
    assert on_kernels.take() is None


def test_a_replay_counts_what_was_captured(on_kernels: Dispatch) -> None:
    """Calls made under another dispatch count there alone, and once more with every replay, apart from Python's."""
    captured = on_kernels.fresh()
    with dispatching(captured):
        ops.rms_norm(torch.ones(1, 32, dtype=torch.bfloat16), None, 1e-6)
    assert on_kernels.take() is None
    calls = captured.take()
    assert calls == (("rms_norm", "cuda", "", 1),)
    for _ in range(3):
        on_kernels.add(calls)
    with dispatching(on_kernels):
        ops.rms_norm(torch.ones(1, 32, dtype=torch.bfloat16), None, 1e-6)
    assert on_kernels.take() == calls * 4
    assert on_kernels.take() is None


def test_modes(on_kernels: Dispatch) -> None:
    """`reference` uses no kernel; `cuda` refuses what would fall back, and takes cuBLAS for many rows."""
    x = torch.ones(1, 32, dtype=torch.bfloat16)
    with dispatching(Dispatch("reference", ops_cuda, "cpu")) as reference:
        ops.rms_norm(x, None, 1e-6)
    assert reference.calls == {("rms_norm", "reference", "TRIO_LLM_KERNELS"): 1}
    with dispatching(Dispatch("cuda", ops_cuda, "cpu")) as strict:
        ops.rms_norm(x, None, 1e-6)
        ops.linear(x.expand(20, -1), ops.Dense(x))
        with pytest.raises(UnsupportedError, match=r"act_and_mul with dtype torch\.float32"):
            ops.act_and_mul(x.float(), "silu")
    assert strict.calls == {("rms_norm", "cuda", ""): 1, ("linear", "cublas", "many rows"): 1}


def test_another_mode_is_refused_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """A word that is none of the modes is one line that names the variable and what it may be."""
    monkeypatch.delenv("TRIO_LLM_KERNELS", raising=False)
    assert mode_from_environment() == "auto"
    monkeypatch.setenv("TRIO_LLM_KERNELS", "gpu")
    with pytest.raises(ConfigError, match="TRIO_LLM_KERNELS = 'gpu': one of auto, native, cuda, reference"):
        load_runner(EngineConfig(model="nowhere"))


def test_a_device_without_kernels_runs_the_reference() -> None:
    """Kernels for another device are not used, and nothing is counted."""
    with dispatching(Dispatch(kernels=ops_cuda)) as counting:
        ops.rms_norm(torch.ones(1, 32, dtype=torch.bfloat16), None, 1e-6)
    assert counting.calls == {}
