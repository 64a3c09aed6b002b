from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from trio_llm.errors import CheckpointError, UnsupportedError
from trio_llm.model.config import ModelConfig
from trio_llm.model.paged.rope import make_rope


def config(**values: Any) -> ModelConfig:
    """Stand in for a parsed config.json."""
    return ModelConfig({"max_position_embeddings": 128, **values}, "config.json")


def test_a_missing_key_is_named() -> None:
    """An absent key, or a null, is an error that names file and key."""
    for values in ({}, {"hidden_size": None}):
        with pytest.raises(CheckpointError, match=r"config\.json: hidden_size is missing"):
            config(**values).get_int("hidden_size")


@pytest.mark.parametrize(
    ("method", "value"),
    [("get_int", "8"), ("get_int", 8.0), ("get_int", True), ("get_float", "1"), ("get_bool", 1), ("get_str", 3)],
)
def test_a_wrong_type_is_named(method: str, value: object) -> None:
    """A value of another JSON type is refused with the value and what was expected."""
    with pytest.raises(CheckpointError, match=r"key = .*: expected"):
        getattr(config(key=value), method)("key")


@pytest.mark.parametrize("value", [0, -1, 2**40])
def test_integers_have_limits(value: int) -> None:
    """Sizes that no model has are refused, before memory is asked for."""
    with pytest.raises(CheckpointError, match="must be from 1 to"):
        config(key=value).get_int("key")


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e400"])
def test_floats_are_finite(text: str) -> None:
    """What json.loads lets through but no computation survives is refused."""
    with pytest.raises(CheckpointError, match="must be finite"):
        config(key=json.loads(text)).get_float("key")


@pytest.mark.parametrize("value", [0, -1, -1e-9])
def test_floats_are_positive_unless_said(value: float) -> None:
    """A base, a factor or an epsilon that is not above 0 makes every logit NaN: it is refused before loading."""
    with pytest.raises(CheckpointError, match="must be above 0"):
        config(key=value).get_float("key")
    assert config(key=value).get_float("key", above=-math.inf) == value


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": 1} x'])
def test_a_file_that_is_no_object_is_refused(content: bytes, tmp_path: Path) -> None:
    """Whatever a config.json holds that is not one JSON object is one typed error that names the file."""
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        ModelConfig.from_directory(tmp_path)


def test_a_config_that_is_no_file_is_refused(tmp_path: Path) -> None:
    """A directory, a pipe or nothing at all in the place of config.json is refused without waiting."""
    with pytest.raises(CheckpointError, match="no such file"):
        ModelConfig.from_directory(tmp_path)
    (tmp_path / "config.json").symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="leads out of the model directory"):
        ModelConfig.from_directory(tmp_path)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"torch_dtype": "float16"}, torch.float16),
        ({"dtype": "float32"}, torch.float32),
        ({"dtype": "torch.bfloat16"}, torch.bfloat16),
        ({"text_config": {"dtype": "float32"}}, torch.float32),
        ({}, torch.bfloat16),
    ],
)
def test_both_spellings_of_dtype(values: dict[str, Any], expected: torch.dtype) -> None:
    """The checkpoint's dtype is found under its old and new name, and inside a multimodal wrapper."""
    assert config(**values).dtype() == expected


def test_an_unknown_dtype_is_refused_by_name() -> None:
    """A dtype that is not here is named beside those that are."""
    with pytest.raises(UnsupportedError, match=r"float8_e4m3fn.*bfloat16"):
        config(dtype="float8_e4m3fn").dtype()


@pytest.mark.parametrize(("value", "expected"), [(7, (7,)), ([7, 9], (7, 9)), (None, ()), (0, (0,))])
def test_token_ids_are_one_or_many(value: object, expected: tuple[int, ...]) -> None:
    """End-of-sequence ids come as a number or a list."""
    assert config(eos_token_id=value).token_ids("eos_token_id") == expected


@pytest.mark.parametrize("value", ["2", [1, "x"], [True], -1])
def test_odd_token_ids_are_refused(value: object) -> None:
    """What is not an id is refused by name."""
    with pytest.raises(CheckpointError, match="eos_token_id"):
        config(eos_token_id=value).token_ids("eos_token_id")


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    "values",
    [
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}},
        {"rope_parameters": {"full_attention": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}}},
    ],
)
def test_all_spellings_of_rope_agree(values: dict[str, Any]) -> None:
    """Old and new spellings of the same scaling give the same frequencies."""
    expected = make_rope(config(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}), 16).inv_freq
    assert torch.equal(make_rope(config(**values), 16, "full_attention").inv_freq, expected)
    assert not torch.equal(make_rope(config(rope_theta=5e5), 16).inv_freq, expected)


def test_a_null_rope_scaling_is_none() -> None:
    """`rope_scaling: null` beside `rope_theta` is plain rope, as most old configs have it."""
    expected = 5e5 ** -(torch.arange(0, 16, 2) / 16)
    assert torch.allclose(make_rope(config(rope_theta=5e5, rope_scaling=None), 16).inv_freq, expected)


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "su", "mrope"])
def test_other_ropes_are_refused_by_name(kind: str) -> None:
    """A scaling that is not here is never silently left out."""
    with pytest.raises(UnsupportedError, match=f"{kind}.*llama3"):
        make_rope(config(rope_scaling={"rope_type": kind, "factor": 2.0}), 16)


def test_partial_rotation_outside_gemma_is_refused() -> None:
    """partial_rotary_factor means something else in each family; where it is not implemented it is refused."""
    with pytest.raises(UnsupportedError, match="partial_rotary_factor"):
        make_rope(config(partial_rotary_factor=0.5), 16)
