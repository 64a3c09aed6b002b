from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.model.families import FAMILIES, make_oracle, save
from tests.model.golden import FP32_TOLERANCE, Golden, max_difference
from tests.model.paged import CPU, Paged, load
from trio_llm.config import EngineConfig
from trio_llm.errors import CheckpointError
from trio_llm.model.checkpoint import tensors
from trio_llm.model.loading.loader import inspect_model, load_model
from trio_llm.model_info import Progress


def copy_config(source: Path, target: Path, **changes: Any) -> Path:
    """Write a directory with nothing but a config.json."""
    values = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**values, **changes}))
    return target


@pytest.mark.parametrize("name", FAMILIES)
def test_dummy_weights_need_a_config_alone(name: str, golden: Callable[[str], Golden], tmp_path: Path) -> None:
    """load_format dummy runs every family from its config.json, the same for the same seed, in the config's dtype."""
    directory = copy_config(golden(name).directory, tmp_path)
    logits = [
        Paged(load(directory, load_format="dummy", seed=seed), 1).prefill([[5, 6, 7, 8]], None)[0] for seed in (0, 0, 1)
    ]
    assert torch.isfinite(logits[0]).all()
    assert logits[0].std() > 0
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


def test_progress_reaches_the_end(golden: Callable[[str], Golden]) -> None:
    """Loading reports growing bytes of a known total, and ends at it."""
    reports: list[Progress] = []
    loaded = load_model(inspect_model(EngineConfig(model=str(golden("qwen3").directory))), CPU, reports.append)
    assert [report.done for report in reports] == sorted(report.done for report in reports)
    assert {(report.total, report.unit) for report in reports} == {(loaded.plan.stored_bytes, "bytes")}
    assert reports[-1].done == reports[-1].total > 0


def test_other_towers_are_skipped_and_reported(golden: Callable[[str], Golden]) -> None:
    """Of a multimodal checkpoint the language model is read, and what was left out is named with counts."""
    plan = inspect_model(EngineConfig(model=str(golden("gemma4-wrapper").directory)))
    assert plan.architecture == "Gemma4ForConditionalGeneration"
    assert plan.skipped.keys() == {"vision_tower", "embed_vision"}
    assert all(count > 0 for count in plan.skipped.values())


def test_a_strange_tower_is_not_skipped(golden: Callable[[str], Golden], tmp_path: Path) -> None:
    """Only towers known by name are skipped: anything else in a multimodal checkpoint is unexpected."""
    shutil.copytree(golden("gemma4-wrapper").directory, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "model.smell_tower.nose": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"unexpected model\.smell_tower\.nose"):
        inspect_model(EngineConfig(model=str(tmp_path)))


@pytest.mark.parametrize("name", ["gemma4-e2b", "gemma4-31b"])
def test_gemma4_as_published(name: str, golden: Callable[[str], Golden], tmp_path: Path) -> None:
    """Published spellings (global_head_dim, null for absent) and leftover tensors of sharing layers load the same."""
    case = golden(name)
    shutil.copytree(case.directory, tmp_path, dirs_exist_ok=True)
    values = json.loads((tmp_path / "config.json").read_text())
    del values["per_layer_config"]
    values |= {"global_head_dim": 16, "num_global_key_value_heads": 2 if values["attention_k_eq_v"] else None}
    (tmp_path / "config.json").write_text(json.dumps(values))
    tensors = load_file(tmp_path / "model.safetensors")
    if values["num_kv_shared_layers"]:
        for part in ("k_proj", "v_proj", "k_norm"):
            tensors[f"model.layers.5.self_attn.{part}.weight"] = torch.full((2, 2), torch.nan)
    save_file(tensors, tmp_path / "model.safetensors")
    assert max_difference(load(tmp_path), case, 16) < FP32_TOLERANCE


def test_leftovers_of_layers_that_do_not_share_are_unexpected(golden: Callable[[str], Golden], tmp_path: Path) -> None:
    """A v_proj in a layer whose values are its keys means that config and checkpoint do not belong together."""
    shutil.copytree(golden("gemma4-31b").directory, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.2.self_attn.v_proj.weight"] = torch.ones(2, 2)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"unexpected model\.layers\.2\.self_attn\.v_proj"):
        inspect_model(EngineConfig(model=str(tmp_path)))


def test_generation_config_names_ends_and_sampling(golden: Callable[[str], Golden], tmp_path: Path) -> None:
    """End tokens are those of generation_config.json and config.json; default sampling is the former's."""
    shutil.copytree(golden("qwen2").directory, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [9, 7], "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05})
    )
    plan = inspect_model(EngineConfig(model=str(tmp_path)))
    assert plan.eos_token_ids == (9, 7, 2)
    assert plan.default_sampling == {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}
    (tmp_path / "generation_config.json").unlink()
    plan = inspect_model(EngineConfig(model=str(tmp_path)))
    assert plan.eos_token_ids == (2,)
    assert plan.default_sampling == {}


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("temperature", -0.1, "at least 0"),
        ("top_p", 7, "above 0 and at most 1"),
        ("top_p", 0, "above 0 and at most 1"),
        ("min_p", 2, "from 0 to 1"),
        ("repetition_penalty", 0, "above 0"),
        ("top_k", -2, "from -1 to"),
    ],
)
def test_default_sampling_that_no_request_may_have_is_refused(
    golden: Callable[[str], Golden], tmp_path: Path, key: str, value: float, allowed: str
) -> None:
    """The error names file, key, value and what is allowed; else every request that leaves it out would be a 400."""
    shutil.copytree(golden("qwen2").directory, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text(json.dumps({key: value}))
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: {key} = {value}.*{allowed}"):
        inspect_model(EngineConfig(model=str(tmp_path)))


def test_yarn_stretches_the_context(golden: Callable[[str], Golden]) -> None:
    """The model's length limit is the config's, or YaRN's factor times the original where that is longer."""
    plans = [inspect_model(EngineConfig(model=str(golden(name).directory))) for name in ("llama", "llama-yarn")]
    assert [plan.max_model_len for plan in plans] == [256, 256]
    values = {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}}
    from trio_llm.model.config import ModelConfig
    from trio_llm.model.loading.loader import max_model_len

    assert max_model_len(ModelConfig({"max_position_embeddings": 256, **values}, "config.json")) == 1024


def test_the_dtype_may_be_chosen(golden: Callable[[str], Golden]) -> None:
    """The checkpoint's own dtype unless the settings, or the caller, say otherwise."""
    directory = str(golden("qwen3").directory)
    assert inspect_model(EngineConfig(model=directory)).dtype == torch.float32
    assert inspect_model(EngineConfig(model=directory, dtype="float16")).dtype == torch.float16
    assert inspect_model(EngineConfig(model=directory), torch.bfloat16).dtype == torch.bfloat16


def test_expert_load_counts_every_token(golden: Callable[[str], Golden]) -> None:
    """Each sparse layer counts the tokens its experts got: tokens times experts per token in all."""
    case = golden("mixtral")
    loaded = load(case.directory)
    Paged(loaded, 1).prefill([case.prompts[0]], 7)
    load_counts = loaded.model.expert_load()
    assert load_counts is not None
    assert load_counts.shape == (3, 6)
    assert load_counts.sum(1).tolist() == [2 * len(case.prompts[0])] * 3
    assert load(golden("llama").directory).model.expert_load() is None


def test_weights_are_not_mapped_files(tmp_path: Path) -> None:
    """A loaded model owns its memory: truncating the file afterwards changes nothing."""
    save(make_oracle("qwen2"), tmp_path)
    loaded = load(tmp_path)
    before = Paged(loaded, 1).prefill([[5, 6, 7]], None)[0]
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert torch.equal(Paged(loaded, 1).prefill([[5, 6, 7]], None)[0], before)


def test_files_are_mapped_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has been read of a file does not stay in memory until all of it has been."""

    class File:
        """A mapped file."""

    monkeypatch.setattr(tensors, "_MAX_MAPPED_BYTES", 100)
    files, path, other = tensors.MappedFiles(lambda _: File()), Path("a"), Path("b")
    first = weakref.ref(files.at(path, 60))
    assert files.at(path, 40) is first()
    files.at(other, 100)
    second = weakref.ref(files.at(path, 1))
    assert first() is None
    assert files.at(path, 99) is second()
    huge = weakref.ref(files.at(path, 1000))
    assert second() is None
    files.close()
    assert huge() is None
