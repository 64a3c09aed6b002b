"""The metadata of a GGUF file, written as the config.json and generation_config.json that Hugging Face would have.

Knows GGUF's names and nothing of how a model computes.
"""

from __future__ import annotations

import re
from typing import Any

from trio_llm.errors import CheckpointError, UnsupportedError
from trio_llm.gguf.header import GgufHeader

# GGUF's architecture -> config.json's, for models without and with experts.
_ARCHITECTURES: dict[str, tuple[str | None, str | None]] = {
    "llama": ("LlamaForCausalLM", "MixtralForCausalLM"),
    "mistral3": ("MistralForCausalLM", None),
    "qwen2": ("Qwen2ForCausalLM", None),
    "qwen3": ("Qwen3ForCausalLM", None),
    "qwen3moe": (None, "Qwen3MoeForCausalLM"),
    "gemma4": ("Gemma4ForCausalLM", "Gemma4ForCausalLM"),
}
_INTEGERS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
    "head_dim": "attention.key_length",
    "num_local_experts": "expert_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "num_experts_per_tok": "expert_used_count",
    "sliding_window": "attention.sliding_window",
}
_FLOATS = {"rms_norm_eps": "attention.layer_norm_rms_epsilon", "rope_theta": "rope.freq_base"}
_DENSE = re.compile(r"blk\.(\d{1,5})\.ffn_gate\.weight")


def architecture(header: GgufHeader) -> str:
    """Return the architecture's name in config.json.

    Raises:
        UnsupportedError: Names what is supported.
    """
    name = header.get("general.architecture", str)
    if name not in _ARCHITECTURES:
        supported = ", ".join(_ARCHITECTURES)
        raise UnsupportedError(f"{header.path}: general.architecture = {name!r} is not supported; {supported} are")
    dense, sparse = _ARCHITECTURES[name]
    found = sparse if header.metadata.get(f"{name}.expert_count") else dense
    if found is None:
        how = "without" if dense is None else "with"
        raise UnsupportedError(f"{header.path}: general.architecture = {name!r} {how} experts is not supported")
    return found


def config_json(header: GgufHeader) -> dict[str, Any]:
    """Return the contents of a config.json for the same model."""
    name = header.get("general.architecture", str)
    values: dict[str, Any] = {"architectures": [architecture(header)], "dtype": "bfloat16"}
    differing = _gemma4(header) if name == "gemma4" else {"hidden_act": "silu"}
    for keys, kind in ((_INTEGERS, int), (_FLOATS, float)):
        for key, stored in keys.items():
            if key not in differing and f"{name}.{stored}" in header.metadata:
                values[key] = header.get(f"{name}.{stored}", kind)
    values.update(differing)
    if "num_local_experts" in values:
        values["norm_topk_prob"] = True  # What every published model does; the format has no word for it.
        values["mlp_only_layers"] = [int(match[1]) for match in map(_DENSE.fullmatch, header.tensors) if match]
    if f"{name}.attention.temperature_scale" in header.metadata:
        raise UnsupportedError(f"{header.path}: {name}.attention.temperature_scale is not supported")
    values["vocab_size"] = header.get(f"{name}.vocab_size", int, len(header.get("tokenizer.ggml.tokens", list)))
    values["tie_word_embeddings"] = "output.weight" not in header.tensors
    scaling = header.metadata.get(f"{name}.rope.scaling.type", "none")
    if scaling not in ("none", "linear", "yarn"):
        raise UnsupportedError(f"{header.path}: {name}.rope.scaling.type = {scaling!r} is not supported")
    if scaling != "none":
        values["rope_scaling"] = {"rope_type": scaling, "factor": header.get(f"{name}.rope.scaling.factor", float)}
        original = f"{name}.rope.scaling.original_context_length"
        if original in header.metadata:
            values["rope_scaling"]["original_max_position_embeddings"] = header.get(original, int)
    return values


def _gemma4(header: GgufHeader) -> dict[str, Any]:
    """Return what Gemma 4 spells in its own way: layers differ in head size, KV heads and feed-forward width."""
    types = ["sliding_attention" if sliding else "full_attention" for sliding in _per_layer(header, _PATTERN, bool)]
    widths = _per_layer(header, "gemma4.feed_forward_length", int, len(types))
    kv_heads = dict(zip(types, _per_layer(header, "gemma4.attention.head_count_kv", int, len(types)), strict=True))
    shared = header.get("gemma4.attention.shared_kv_layers", int, 0)
    values: dict[str, Any] = {
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": types,
        "intermediate_size": min(widths),
        "use_double_wide_mlp": max(widths) > min(widths),
        "num_kv_shared_layers": shared,
        "hidden_size_per_layer_input": header.get("gemma4.embedding_length_per_layer_input", int, 0),
        "head_dim": header.get("gemma4.attention.key_length_swa", int),
        "global_head_dim": header.get("gemma4.attention.key_length", int),
        "num_key_value_heads": kv_heads.get("sliding_attention", kv_heads.get("full_attention")),
        "num_global_key_value_heads": kv_heads.get("full_attention"),
        # The format says it by leaving out the values' weights.
        "attention_k_eq_v": any(
            kind == "full_attention" and f"blk.{layer}.attn_v.weight" not in header.tensors
            for layer, kind in enumerate(types[: len(types) - shared])
        ),
        "rope_parameters": {
            "full_attention": _plain_rope(header, "gemma4.rope.freq_base"),
            "sliding_attention": _plain_rope(header, "gemma4.rope.freq_base_swa"),
        },
    }
    if "gemma4.final_logit_softcapping" in header.metadata:
        values["final_logit_softcapping"] = header.get("gemma4.final_logit_softcapping", float)
    if experts := header.get("gemma4.expert_count", int, 0):
        values |= {
            "enable_moe_block": True,
            "num_experts": experts,
            "top_k_experts": header.get("gemma4.expert_used_count", int),
        }
    return values


_PATTERN = "gemma4.attention.sliding_window_pattern"


def _plain_rope(header: GgufHeader, key: str) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": header.get(key, float, 10_000.0)}


def _per_layer(header: GgufHeader, key: str, kind: type, count: int | None = None) -> list[Any]:
    """Return a list with a value for each layer; one value stands for `count` of them."""
    values = header.get(key, (list, kind) if count is not None else list)
    values = values if isinstance(values, list) else [values] * (count or 0)
    if not values or (count is not None and len(values) != count) or not all(type(value) is kind for value in values):
        raise CheckpointError(f"{header.path}: {key} must be a list with one {kind.__name__} for each layer")
    return values


def set_rope_factors(values: dict[str, Any], factors: list[float]) -> None:
    """Divide the frequencies by a file's own factors, in layers of full attention if they differ from the others."""
    layers = values.get("rope_parameters")
    theta = values.get("rope_theta", 10_000.0) if layers is None else layers["full_attention"]["rope_theta"]
    scaled = {"rope_type": "frequency_factors", "rope_theta": theta, "factors": factors}
    values["rope_parameters"] = scaled if layers is None else {**layers, "full_attention": scaled}


def generation_json(header: GgufHeader) -> dict[str, Any]:
    """Return the contents of a generation_config.json: every token that ends an answer, the primary one first."""
    keys = ("eos", "eot", "eom")
    found = [header.metadata.get(f"tokenizer.ggml.{key}_token_id") for key in keys]
    ends = [token_id for token_id in dict.fromkeys(found) if isinstance(token_id, int)]
    return {"eos_token_id": ends} if ends else {}
