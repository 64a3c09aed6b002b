"""Tiny random checkpoints of every family, made by transformers, which is also the oracle.

Weights are large (0.15) and norms, biases and scalars random, so that each of them shows in the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB = 128
WINDOW = 8
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SCALED = {"factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **SCALED}
HYBRID = ["sliding_attention", "sliding_attention", "full_attention"]


def _llama(**options: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SMALL, **options}))


def _qwen2(**options: Any) -> Any:
    options = {**SMALL, **options}
    del options["head_dim"]
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**options))


def _qwen3(**options: Any) -> Any:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**{**SMALL, **options}))


def _mistral(**options: Any) -> Any:
    return transformers.MistralForCausalLM(transformers.MistralConfig(**{**SMALL, **options}))


def _mixtral(**options: Any) -> Any:
    experts = {"num_local_experts": 6, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**{**SMALL, **experts, **options}))


def _qwen3_moe(**options: Any) -> Any:
    experts = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "norm_topk_prob": True}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**{**SMALL, **experts, **options}))


def _gemma4_config(**options: Any) -> Any:
    shape = {
        "num_hidden_layers": 6,
        "layer_types": HYBRID * 2,
        "head_dim": 8,
        "global_head_dim": 16,
        "sliding_window": WINDOW,
        "final_logit_softcapping": 5.0,  # low enough to show in the logits of a tiny model
        "rms_norm_eps": 1e-2,  # high, or norms after it would hide a branch's wrong scale
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": VOCAB,
    }
    return transformers.Gemma4TextConfig(**{**SMALL, **shape, **options})


def _gemma4(**options: Any) -> Any:
    return transformers.Gemma4ForCausalLM(_gemma4_config(**options))


E2B = {"hidden_size_per_layer_input": 8, "num_kv_shared_layers": 3, "use_double_wide_mlp": True}
A4B = {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 3, "moe_intermediate_size": 24}
K_EQ_V = {"attention_k_eq_v": True, "num_key_value_heads": 4, "num_global_key_value_heads": 2}


def _gemma4_wrapper() -> Any:
    tower = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "position_embedding_size": 8,
    }
    config = transformers.Gemma4Config(text_config=_gemma4_config(**E2B).to_dict(), vision_config=tower)
    return transformers.Gemma4ForConditionalGeneration(config)


FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: _llama(num_key_value_heads=4),
    "llama3-rope-gqa-tied": lambda: _llama(rope_parameters=LLAMA3, tie_word_embeddings=True),
    "llama-biases-linear-rope": lambda: _llama(
        attention_bias=True, mlp_bias=True, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    ),
    "llama-yarn": lambda: _llama(rope_parameters={"rope_type": "yarn", **SCALED}),
    "qwen2": lambda: _qwen2(tie_word_embeddings=True),
    "qwen2-window": lambda: _qwen2(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "qwen3": _qwen3,
    "qwen3-window": lambda: _qwen3(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2),
    "qwen3-moe": lambda: _qwen3_moe(mlp_only_layers=[1]),
    "mistral": lambda: _mistral(sliding_window=None),
    "mistral-window": lambda: _mistral(sliding_window=WINDOW),
    "mixtral": _mixtral,
    "gemma4-e2b": lambda: _gemma4(**E2B),
    "gemma4-26b": lambda: _gemma4(**A4B, **K_EQ_V),
    "gemma4-31b": lambda: _gemma4(**K_EQ_V),
    "gemma4-wrapper": _gemma4_wrapper,
}


# Families whose sizes can be chosen.
SHAPED: dict[str, Callable[..., Any]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3-moe": _qwen3_moe,
    "mistral": lambda **options: _mistral(sliding_window=None, **options),
    "mixtral": _mixtral,
}


def make_oracle(name: str) -> Any:
    """Build the transformers model of a family, float32, with every parameter random."""
    torch.manual_seed(sum(name.encode()))
    model = FAMILIES[name]().float().eval()
    for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "inv_freq" in key or "embed_scale" in key or "vision" in key:
            continue
        if key.endswith("bias"):
            tensor.data.normal_(std=0.3)
        elif tensor.ndim == 1:  # norms, scalars, scales
            # Gemma's softmax has no scale but these norms: at 1 its scores would be as large as no trained model's
            mean = 0.5 if name.startswith("gemma") and ("q_norm" in key or "k_norm" in key) else 1.0
            tensor.data.normal_(mean=mean, std=0.3 * mean)
    return model


def save(model: Any, directory: Path, *, shard_bytes: int | None = None) -> Path:
    """Write a checkpoint as transformers does."""
    model.save_pretrained(directory, max_shard_size=shard_bytes or "1GB")
    return directory
