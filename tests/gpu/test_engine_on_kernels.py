"""The engine on its own kernels, in bfloat16 and float16, with decode graphs and without; and what it leaves behind.

Checkpoints are of sizes that kernels take. Log-probabilities are held to transformers' in float32 on a CPU, by the
bound that the torch reference holds there (tests/model_runner/reduced.py); graphs are held to launches one by one.
"""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

from tests.kernels.helpers import assert_close
from tests.model_runner.conftest import Golden
from tests.model_runner.drive import run
from tests.model_runner.reduced import MOST, WAYS, mean_error
from tests.model_runner.rows_in_torch import layer_of, long_from
from tests.model_runner.test_graphs_on_kernels import CASES, MODELS, compare, settings
from tests.model_runner.test_launch import forgetful, run_ahead
from tests.model_runner.test_reduced_runs import case
from tools.kernel_lab.attention import Case, make
from trio_llm.config import EngineConfig
from trio_llm.messages import StepPlan
from trio_llm.model.load import load_runner
from trio_llm.model.ops import cuda as ops_cuda
from trio_llm.model.ops import seam as ops
from trio_llm.model.ops.dispatch import Dispatch, dispatching
from trio_llm.params import SamplingParams

__all__ = ["case"]
pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("enforce_eager", [False, True])
@pytest.mark.parametrize("options", [{}, {"kv_quantization": True}, {"dtype": "float16"}], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_as_likely_as_transformers_finds_them(
    case: Golden, name: str, options: dict[str, Any], enforce_eager: bool
) -> None:
    """With prefix cache, chunks, batches and preemption, graphs or not, errors stay within the bound."""
    options = {"dtype": "bfloat16", "device": "cuda", "block_size": 16, "num_kv_blocks": 640, **options}
    runner = load_runner(
        EngineConfig(model=str(case.directory), max_batch_size=16, enforce_eager=enforce_eager, **options)
    )
    ways = [way for way in WAYS if way != "preemption"]  # blocks of 16 tokens are too large for it
    assert {way: error for way in ways if (error := mean_error(runner, case, way)) >= MOST} == {}
    runner.close()


@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_torch_attends_as_the_kernel_does(head_dim: int, dtype: torch.dtype) -> None:
    """Prefills with and without a cached prefix, of odd lengths, beside rows of the kernel: all right in float64."""
    sequences = ((900, 2051), (1, 700), (301, 301), (64, 4099), (1, 3), (257, 1000))
    problem = make(Case(head_dim=head_dim, group=7, dtype=dtype, sequences=sequences), torch.device("cuda"))
    batch, kv, spec = layer_of(problem)
    with long_from(64), dispatching(Dispatch("cuda", ops_cuda)) as dispatch:
        out = ops.paged_attention(problem.q, batch, kv, spec).view_as(problem.q)
    assert_close(out, problem.expect(), slack=4)
    assert dispatch.calls == {("paged_attention", "torch", ops_cuda.FOR_FLASH_IN_PART): 1}


@pytest.mark.parametrize("name", ["qwen3", "gemma4"])
def test_tokens_are_as_likely_where_torch_attends_for_prefills(case: Golden, name: str) -> None:
    """As above, with every chunk of four tokens and more by torch, beside decodes by the kernel."""
    options = {"dtype": "bfloat16", "device": "cuda", "block_size": 16, "num_kv_blocks": 640}
    runner = load_runner(EngineConfig(model=str(case.directory), max_batch_size=16, **options))
    with long_from(4):
        errors = {way: mean_error(runner, case, way) for way in WAYS if way != "preemption"}
    assert max(errors.values()) < MOST
    runner.close()


@pytest.mark.parametrize("name", ["qwen3"])
def test_the_start_measures_who_attends_for_prefills(case: Golden, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Both ways are timed at the lengths of its steps, and agree; the log says who has prefills, and from when."""
    options = {"dtype": "bfloat16", "device": "cuda", "max_num_batched_tokens": 4096, "num_kv_blocks": 640}
    with caplog.at_level(logging.INFO):
        load_runner(EngineConfig(model=str(case.directory), **options)).close()
    said = [message for message in caplog.messages if "attend" in message]
    assert any(message.startswith("4096 tokens attend in ") for message in said), said
    assert not any("differs" in message or "failed" in message for message in said), said


@pytest.mark.parametrize(("name", "options"), CASES)
def test_graphs_do_what_launches_do(
    name: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three rows in a graph of four, captured and replayed by CUDA itself."""
    config = settings(name, tmp_path, monkeypatch, device="cuda", **options)
    compare(load_runner(attrs.evolve(config, enforce_eager=True)), load_runner(config))


@pytest.mark.parametrize("enforce_eager", [False, True])
@pytest.mark.parametrize("name", ["qwen3", "mixtral"])
def test_two_steps_in_flight_are_two_steps(case: Golden, name: str, enforce_eager: bool) -> None:
    """Plans that do not know what the step before sampled give the very tokens of plans that do."""
    options = {"dtype": "bfloat16", "device": "cuda", "num_kv_blocks": 640, "max_batch_size": 16}
    runner = load_runner(EngineConfig(model=str(case.directory), enforce_eager=enforce_eager, **options))
    greedy = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    plans: list[StepPlan] = []
    outcome = run(runner, [(p, greedy) for p in case.prompts], watch=lambda _, plan: plans.append(plan))
    for request_id in list(runner._rows._row_of):
        runner._drop(request_id)
    outputs: list[list[int]] = [[] for _ in case.prompts]
    for plan, result in zip(plans, run_ahead(runner, forgetful(plans)), strict=True):
        for request_id, token_ids in zip(plan.request_ids, result.token_ids, strict=True):
            outputs[request_id] += token_ids
    assert outputs == outcome.token_ids
    runner.close()


@pytest.mark.parametrize("name", ["mixtral"])
def test_engines_open_and_close(case: Golden, name: str) -> None:
    """A pool of half the memory, weights and graphs are given back, three times over: nothing of an engine stays."""
    config = EngineConfig(
        model=str(case.directory), dtype="bfloat16", device="cuda", max_batch_size=64, gpu_memory_utilization=0.5
    )
    free: list[int] = []
    for _ in range(3):
        runner = load_runner(config)
        runner.close()
        del runner
        gc.collect()
        torch.cuda.empty_cache()
        free.append(torch.cuda.mem_get_info()[0])
    assert free[0] - free[2] < 16 * 2**20  # what the driver rounds to
