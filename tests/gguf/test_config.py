from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trio_llm.errors import CheckpointError, TrioLLMError
from trio_llm.gguf.config import config_json
from trio_llm.gguf.header import GgufHeader
from trio_llm.gguf.names import hf_names

GEMMA4: dict[str, Any] = {
    "general.architecture": "gemma4",
    "gemma4.embedding_length": 48,
    "gemma4.block_count": 3,
    "gemma4.attention.head_count": 4,
    "gemma4.attention.head_count_kv": [4, 4, 2],
    "gemma4.feed_forward_length": [80, 80, 160],
    "gemma4.attention.shared_kv_layers": 1,
    "gemma4.attention.key_length": 16,
    "gemma4.attention.key_length_swa": 8,
    "gemma4.attention.sliding_window": 8,
    "gemma4.attention.sliding_window_pattern": [True, True, False],
    "gemma4.context_length": 256,
    "gemma4.vocab_size": 128,
    "tokenizer.ggml.tokens": ["a"],
}


def config_of(**changes: Any) -> dict[str, Any]:
    """Return the configuration of a file with other metadata; None leaves a key out."""
    metadata = {**GEMMA4, **{f"gemma4.{key.replace('__', '.')}": value for key, value in changes.items()}}
    present = {key: value for key, value in metadata.items() if value is not None}
    return config_json(GgufHeader(Path("model.gguf"), present, {}))


def test_layers_of_gemma4_differ_as_the_file_says() -> None:
    """Head sizes, KV heads and widths of each kind of layer are found under Hugging Face's names."""
    found = config_of()
    assert found["layer_types"] == ["sliding_attention", "sliding_attention", "full_attention"]
    assert (found["head_dim"], found["global_head_dim"]) == (8, 16)
    assert (found["num_key_value_heads"], found["num_global_key_value_heads"]) == (4, 2)
    assert (found["intermediate_size"], found["use_double_wide_mlp"]) == (80, True)
    assert config_of(feed_forward_length=80)["use_double_wide_mlp"] is False
    assert config_of(attention__head_count_kv=2)["num_global_key_value_heads"] == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"attention__sliding_window_pattern": None},
        {"attention__sliding_window_pattern": 5},
        {"attention__sliding_window_pattern": []},
        {"attention__sliding_window_pattern": ["a", "b", "c"]},
        {"attention__sliding_window_pattern": [True, False]},
        {"attention__head_count_kv": [4, 4]},
        {"attention__head_count_kv": "4"},
        {"attention__head_count_kv": [4, 4, 2.5]},
        {"feed_forward_length": []},
        {"feed_forward_length": [True, True, True]},
        {"attention__key_length": None},
        {"attention__key_length": [16]},
        {"attention__shared_kv_layers": "1"},
        {"rope__freq_base": "x"},
        {"final_logit_softcapping": "x"},
        {"expert_count": 8},
    ],
)
def test_metadata_of_another_shape_is_one_line(changes: dict[str, Any]) -> None:
    """A missing, short or mistyped list names its key."""
    with pytest.raises(CheckpointError, match=r"^model\.gguf: gemma4\.") as caught:
        config_of(**changes)
    assert "\n" not in str(caught.value)


def test_mistral3_with_temperature_scaling_is_refused() -> None:
    """Ministral 3 scales queries by position, which nothing here computes."""
    metadata = {"general.architecture": "mistral3", "mistral3.attention.temperature_scale": 0.1}
    with pytest.raises(TrioLLMError, match=r"mistral3\.attention\.temperature_scale is not supported"):
        config_json(GgufHeader(Path("model.gguf"), {**metadata, "mistral3.vocab_size": 8}, {}))


def test_names_without_a_meaning_stay() -> None:
    """What an architecture does not have keeps its name, so that the check of the tensors reports it."""
    for name in ("blk.0.strange.weight", "blk.x.attn_q.weight", "strange", "blk.0.attn_q.scale2", ""):
        assert hf_names(name, "LlamaForCausalLM", 3) == [name]
    assert hf_names("blk.0.ffn_gate_exps.weight", "LlamaForCausalLM", 3) == ["blk.0.ffn_gate_exps.weight"]
    assert len(hf_names("blk.0.ffn_gate_exps.weight", "MixtralForCausalLM", 3)) == 3
