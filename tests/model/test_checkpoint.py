"""Checkpoints from strangers: everything wrong with them is a typed error that says what and where."""

from __future__ import annotations

import contextlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.model.families import make_oracle, save
from tests.model.paged import CPU
from trio_llm.config import EngineConfig
from trio_llm.errors import CheckpointError, UnsupportedError
from trio_llm.model.checkpoint import safetensors as checkpoint
from trio_llm.model.loading.loader import inspect_model, load_model

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Save one checkpoint in one file and one in shards."""
    single, sharded = tmp_path_factory.mktemp("single"), tmp_path_factory.mktemp("sharded")
    save(make_oracle("llama"), single)
    save(make_oracle("llama"), sharded, shard_bytes=40_000)
    return {"single": single, "sharded": sharded}


@pytest.fixture
def single(originals: dict[str, Path], tmp_path: Path) -> Path:
    """Copy the checkpoint of one file, to be damaged."""
    return Path(shutil.copytree(originals["single"], tmp_path / "model"))


@pytest.fixture
def sharded(originals: dict[str, Path], tmp_path: Path) -> Path:
    """Copy the checkpoint of many files, to be damaged."""
    return Path(shutil.copytree(originals["sharded"], tmp_path / "model"))


def edit_tensors(directory: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrite model.safetensors."""
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors")


def edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite a JSON file."""
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))


def refusal(directory: Path, **settings: Any) -> str:
    """Return why a checkpoint is refused."""
    with pytest.raises((CheckpointError, UnsupportedError)) as caught:
        load_model(inspect_model(EngineConfig(model=str(directory), **settings)), CPU)
    return str(caught.value)


def test_all_that_does_not_fit_is_one_error(single: Path) -> None:
    """Missing, misshapen and unexpected tensors, and odd dtypes, are listed together with shapes."""

    def edit(tensors: dict[str, Tensor]) -> None:
        tensors["surprise"] = torch.ones(2)
        tensors[Q_PROJ] = torch.ones(3, 4)
        tensors["model.norm.weight"] = torch.ones(48, dtype=torch.int32)
        del tensors["lm_head.weight"]

    edit_tensors(single, edit)
    message = refusal(single)
    assert "4 tensors do not fit" in message
    assert f"misshapen {Q_PROJ}: found [3, 4], expected [64, 48]" in message
    assert "missing lm_head.weight [128, 48]" in message
    assert "unexpected surprise" in message
    assert "model.norm.weight is stored as I32" in message


def test_a_long_list_is_cut(single: Path) -> None:
    """A checkpoint with nothing right is an error of readable length."""
    edit_tensors(single, lambda tensors: tensors.update({f"t{i}": torch.ones(1) for i in range(500)}))
    message = refusal(single)
    assert "500 tensors do not fit" in message
    assert "and 480 more" in message


def test_checking_reads_no_weights(single: Path) -> None:
    """Shapes and bytes are known from headers: `inspect_model` accepts a file whose weights are all NaN."""
    edit_tensors(single, lambda tensors: tensors.update({k: torch.full_like(v, torch.nan) for k, v in tensors.items()}))
    plan = inspect_model(EngineConfig(model=str(single)))
    assert (
        plan.weight_bytes
        == plan.stored_bytes
        == sum(tensor.nbytes for tensor in load_file(single / "model.safetensors").values())
    )


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("settings", [{}, {"quantization": "int8"}])
def test_weights_that_are_not_finite_are_refused(bad: float, settings: dict[str, Any], single: Path) -> None:
    """One NaN or infinity anywhere is refused with the tensor's name, quantised or not."""
    edit_tensors(single, lambda tensors: tensors[Q_PROJ][5].fill_(bad))
    assert f"{Q_PROJ}: holds NaN or infinity" in refusal(single, **settings)


def test_weights_that_overflow_their_new_dtype_are_refused(single: Path) -> None:
    """A float32 weight that float16 cannot hold is refused, not served as infinity."""
    edit_tensors(single, lambda tensors: tensors[Q_PROJ][5].fill_(1e6))
    assert "infinity in torch.float16" in refusal(single, dtype="float16")


QUANTISED: dict[str, dict[str, Any]] = {
    "bitsandbytes": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    "mxfp4": {"quantization_config": {"quant_method": "mxfp4"}},
    "modelopt": {"text_config": {"quantization_config": {"quant_method": "modelopt"}}},
    "auto-round": {"compression_config": {"quant_method": "auto-round", "bits": 4}},
    "unknown": {"quantization_config": {"bits": 3}},
}


@pytest.mark.parametrize("method", QUANTISED)
def test_quantised_checkpoints_are_refused_by_name(method: str, single: Path) -> None:
    """A method that cannot be read is refused by its name, wherever the config says so."""
    edit_json(single / "config.json", lambda values: values.update(QUANTISED[method]))
    message = refusal(single)
    assert f"quant_method = {method!r} is not supported; AWQ, GPTQ, compressed-tensors and fp8 are" in message
    assert "--quantization int8" in message


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn])
def test_quantised_weights_without_a_word_in_the_config_are_refused(dtype: torch.dtype, single: Path) -> None:
    """Weights stored in a type that needs scales are never cast to what they are not, zeros least of all."""
    edit_tensors(single, lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ].to(dtype)}))
    assert f"{Q_PROJ} is stored as" in refusal(single)


def test_gguf_is_refused_by_name(single: Path) -> None:
    """A directory with another format's weights says that safetensors are wanted."""
    (single / "model.safetensors").rename(single / "model-Q4_K_M.gguf")
    assert "no safetensors file" in refusal(single)


def test_unknown_families_are_refused_by_name(single: Path) -> None:
    """The architecture and those that are served are named; code in the directory is never run."""
    marker = single / "ran"
    (single / "modeling_evil.py").write_text(f"open({str(marker)!r}, 'w')")
    edit_json(
        single / "config.json",
        lambda values: values.update(architectures=["EvilForCausalLM"], auto_map={"AutoModel": "modeling_evil.Evil"}),
    )
    assert "'EvilForCausalLM' is not supported; LlamaForCausalLM" in refusal(single)
    assert not marker.exists()


def test_a_missing_shard_is_named(sharded: Path) -> None:
    """A shard the index names but nobody downloaded is an error with its path."""
    next(sharded.glob("model-00002*")).unlink()
    assert "model-00002-of" in refusal(sharded)


@pytest.mark.parametrize(
    "file",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "",
        ".safetensors",
        "x" * 5000 + ".safetensors",
        7,
        None,
    ],
)
def test_the_index_cannot_lead_outside(file: object, sharded: Path) -> None:
    """weight_map values are plain file names; anything else is refused before any file is opened."""
    edit_json(sharded / INDEX, lambda values: values["weight_map"].update({Q_PROJ: file}))
    assert "expected a plain .safetensors file name" in refusal(sharded)


def test_a_link_cannot_lead_outside(single: Path, tmp_path: Path) -> None:
    """A symbolic link out of the model directory is refused with where it leads."""
    (single / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (single / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    message = refusal(single)
    assert "leads out of the model directory" in message
    assert "elsewhere" in message


def test_a_hub_cache_may_link_to_its_blobs(single: Path, tmp_path: Path) -> None:
    """The layout huggingface_hub leaves, snapshots linked to blobs beside them, is not "outside"."""
    snapshot, blobs = tmp_path / "models--a--b/snapshots/main", tmp_path / "models--a--b/blobs"
    blobs.mkdir(parents=True)
    shutil.copytree(single, snapshot)
    (snapshot / "model.safetensors").rename(blobs / "0123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    assert inspect_model(EngineConfig(model=str(snapshot))).weight_bytes > 0


def test_a_device_is_no_weights(single: Path) -> None:
    """Something that is not a regular file is refused without being read."""
    (single / "model.safetensors").unlink()
    (single / "model.safetensors").mkdir()
    assert "not a regular file" in refusal(single)


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    """Which of two copies wins would depend on the reader, so neither does."""
    first, second, *_ = sorted(sharded.glob("model-*.safetensors"))
    tensors = load_file(second)
    name, tensor = next(iter(load_file(first).items()))
    save_file({**tensors, name: tensor}, second)
    assert name in refusal(sharded)


def test_index_and_files_must_agree(sharded: Path) -> None:
    """A tensor the index has but no file does, or a file has but the index does not, is named."""
    edit_json(
        sharded / INDEX, lambda values: values["weight_map"].update({"ghost": "model-00001-of-00006.safetensors"})
    )
    assert "ghost" in refusal(sharded) or "model-00001" in refusal(sharded)
    edit_json(sharded / INDEX, lambda values: (values["weight_map"].pop("ghost"), values["weight_map"].pop(Q_PROJ)))
    assert Q_PROJ in refusal(sharded)


def header(entries: str, data: bytes = b"") -> bytes:
    """Assemble a safetensors file from a raw header."""
    return struct.pack("<Q", len(entries)) + entries.encode() + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 7,
        struct.pack("<Q", 2**63) + b"{}",
        header("{"),
        header("[]"),
        header('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', b"\x00" * 4),
        header('{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', b"\x00" * 4),
        header('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}', b"\x00" * 4),
        header('{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}', b"\x00" * 4),
        header(
            '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": {"dtype": "F32", "shape": [1], '
            '"data_offsets": [0, 4]}}',
            b"\x00" * 4,
        ),
        header("[" * 5000 + "]" * 5000),
        b"PK\x03\x04 a zip, perhaps a pickle",
    ],
)
def test_damaged_files_are_typed_errors(content: bytes, single: Path) -> None:
    """Truncated, overlapping, lying or duplicate headers name the file and never crash."""
    (single / "model.safetensors").write_bytes(content)
    assert "model.safetensors" in refusal(single)


@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), min_size=1, max_size=4))
def test_any_damage_to_a_header_is_a_typed_error(single: Path, flips: list[tuple[int, int]]) -> None:
    """Whatever bytes of a header are changed, the checkpoint is accepted as it was or refused with a typed error."""
    file = single / "model.safetensors"
    original = file.read_bytes()
    damaged = bytearray(original)
    for place, value in flips:
        damaged[place % (8 + int.from_bytes(original[:8], "little"))] = value
    file.write_bytes(damaged)
    try:
        with contextlib.suppress(CheckpointError):
            inspect_model(EngineConfig(model=str(single)))
    finally:
        file.write_bytes(original)


def test_too_many_tensors_are_refused(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A header of more tensors than any model has is refused with the numbers."""
    monkeypatch.setattr(checkpoint, "MAX_TENSORS", 10)
    assert "more than 10" in refusal(single)


def test_pickles_are_never_loaded(single: Path) -> None:
    """A directory with only pickled weights is refused, saying so."""
    (single / "model.safetensors").unlink()
    (single / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    assert "pickled weights (.bin, .pt) are never loaded" in refusal(single)


def test_sizes_that_do_not_divide_are_refused(single: Path) -> None:
    """Head counts that do not fit together are named before any tensor is looked at."""
    edit_json(single / "config.json", lambda values: values.update(num_key_value_heads=3))
    assert "4 attention heads are not a multiple of 3 KV heads" in refusal(single)


def test_a_million_layers_are_refused(single: Path) -> None:
    """A config cannot make the loader loop or allocate without end."""
    edit_json(single / "config.json", lambda values: values.update(num_hidden_layers=10**6))
    assert "num_hidden_layers = 1000000: must be from 1 to 1000" in refusal(single)


def test_a_tied_checkpoint_may_hold_its_head(single: Path) -> None:
    """A tied model uses its embedding for the head even if the file has both; old rope tables are let pass."""
    edit_json(single / "config.json", lambda values: values.update(tie_word_embeddings=True))
    edit_tensors(
        single, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    )
    loaded = load_model(inspect_model(EngineConfig(model=str(single))), CPU)
    table = load_file(single / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.allclose(loaded.model.logits(torch.eye(48)), table.T, atol=1e-6)
