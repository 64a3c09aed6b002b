"""Whole models through the seam, every operation on its CUDA kernel, simulated, against transformers."""

from __future__ import annotations

import logging
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch

from cuda_kernels.launch import using
from cuda_kernels.simulator import SimulatedLauncher
from tests.model import families
from tests.model.golden import make_golden
from tests.model.paged import Paged, load
from tests.model.test_reduced_precision import errors
from trio_llm.errors import ConfigError, UnsupportedError
from trio_llm.model import ops, ops_torch

SHAPE = {"head_dim": 64, "hidden_size": 64, "num_hidden_layers": 2}
MODELS: dict[str, Any] = {
    "qwen3": lambda: families._qwen3(**SHAPE),
    "llama": lambda: families._llama(**SHAPE, attention_bias=True, rope_parameters=families.LLAMA3),
    "gemma4": lambda: families._gemma4(
        **{**SHAPE, "num_hidden_layers": 3}, layer_types=families.HYBRID, global_head_dim=128, **families.K_EQ_V
    ),
    "mixtral": lambda: families._mixtral(**SHAPE, intermediate_size=64),
}
CASES = [
    ("mixtral", {}),
    ("llama", {"kv_quantization": True, "quantization": "int8"}),
    pytest.param("qwen3", {}, marks=pytest.mark.kernels_full),
    pytest.param("gemma4", {}, marks=pytest.mark.kernels_full),
]


@pytest.fixture
def on_kernels(monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    """Treat CPU tensors as a GPU's, and simulate the GPU."""
    monkeypatch.setattr(ops, "_on_gpu", lambda x: True)
    monkeypatch.setattr(ops, "dispatched", type(ops.dispatched)())
    with using(SimulatedLauncher()):
        yield


@pytest.mark.parametrize(("name", "settings"), CASES, ids=str)
def test_models_match_transformers(
    name: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_kernels: None
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
    fell_back = {op: reason for op, implementation, reason in ops.dispatched if implementation == "reference"}
    assert fell_back.keys() <= {"linear", "gated_linear"} and all("rows" in reason for reason in fell_back.values())
    used = {op for op, implementation, _ in ops.dispatched if implementation == "cuda"}
    own = {"gemma4": {"rms_norm", "gated_linear"}, "mixtral": {"route", "moe", "add_rms_norm"}}
    assert used >= {"linear", "write_kv", "paged_attention"} | own.get(name, {"gated_linear", "add_rms_norm"})


def test_a_fallback_is_said_once_and_counted(on_kernels: None, caplog: pytest.LogCaptureFixture) -> None:
    """What no kernel takes runs on the reference; the log says so once, the counter every time."""
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            out = ops.act_and_mul(torch.ones(1, 32), "silu")
    assert torch.equal(out, ops_torch.act_and_mul(torch.ones(1, 32), "silu"))
    assert [r.message for r in caplog.records] == [
        "no kernel does act_and_mul with dtype torch.float32: the torch reference runs"
    ]
    assert ops.dispatched == {("act_and_mul", "reference", "dtype torch.float32"): 3}


def test_modes(on_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """`reference` uses no kernel, `cuda` refuses what none takes, and another word is refused by name."""
    x = torch.ones(1, 32, dtype=torch.bfloat16)
    monkeypatch.setenv("TRIO_LLM_KERNELS", "reference")
    ops.rms_norm(x, None, 1e-6)
    assert ops.dispatched == {}
    monkeypatch.setenv("TRIO_LLM_KERNELS", "cuda")
    ops.rms_norm(x, None, 1e-6)
    assert ops.dispatched == {("rms_norm", "cuda", ""): 1}
    with pytest.raises(UnsupportedError, match=r"act_and_mul with dtype torch\.float32"):
        ops.act_and_mul(x.float(), "silu")
    monkeypatch.setenv("TRIO_LLM_KERNELS", "gpu")
    with pytest.raises(ConfigError, match="TRIO_LLM_KERNELS = 'gpu': one of auto, cuda, reference"):
        ops.rms_norm(x, None, 1e-6)


def test_a_cpu_needs_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the reference runs, and nothing is counted."""
    monkeypatch.setattr(ops, "dispatched", type(ops.dispatched)())
    ops.rms_norm(torch.ones(1, 32, dtype=torch.bfloat16), None, 1e-6)
    assert ops.dispatched == {}
