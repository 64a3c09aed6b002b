"""The bound that kernels on a GPU are held to, first held by the torch reference on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kernels.test_models_on_kernels import MODELS
from tests.model import families
from tests.model_runner.conftest import Golden, make_prompts
from tests.model_runner.reduced import MOST, WAYS, mean_error
from trio_llm.config import EngineConfig
from trio_llm.model.load import load_runner


@pytest.fixture
def case(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Golden:
    """Return a checkpoint of sizes that kernels take, and its oracle."""
    monkeypatch.setitem(families.FAMILIES, "on-kernels", MODELS[name])
    oracle = families.make_oracle("on-kernels")
    return Golden(families.save(oracle, tmp_path), oracle, make_prompts())


@pytest.mark.parametrize("kv_quantization", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_moves_log_probabilities_little(case: Golden, name: str, kv_quantization: bool) -> None:
    """However steps are cut, tokens are as likely as transformers finds them in float32, within the bound."""
    options = {"dtype": "bfloat16", "block_size": 4, "num_kv_blocks": 640, "kv_quantization": kv_quantization}
    runner = load_runner(EngineConfig(model=str(case.directory), max_batch_size=16, **options))
    ways = WAYS if name == "mixtral" else ["prefix cache", "preemption"]
    assert {way: error for way in ways if (error := mean_error(runner, case, way)) >= MOST} == {}
