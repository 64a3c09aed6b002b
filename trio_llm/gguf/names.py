"""The names of GGUF's tensors, as Hugging Face's checkpoints of the same architecture spell them."""

from __future__ import annotations

import re

_WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "per_layer_token_embd.weight": "model.embed_tokens_per_layer.weight",
    "per_layer_model_proj.weight": "model.per_layer_model_projection.weight",
    "per_layer_proj_norm.weight": "model.per_layer_projection_norm.weight",
}
_COMMON = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_PARTS: dict[str, dict[str, str]] = {
    "MixtralForCausalLM": {"ffn_gate_inp": "block_sparse_moe.gate"},
    "Qwen3MoeForCausalLM": {"ffn_gate_inp": "mlp.gate"},
    "Gemma4ForCausalLM": {
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
        "post_ffw_norm_1": "post_feedforward_layernorm_1",
        "post_ffw_norm_2": "post_feedforward_layernorm_2",
        "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
        "inp_gate": "per_layer_input_gate",
        "proj": "per_layer_projection",
        "post_norm": "post_per_layer_input_norm",
        "ffn_gate_inp": "router.proj",
    },
}
# Whole names of a layer's tensors that do not end in .weight here, or not there.
_TENSORS: dict[str, dict[str, str]] = {
    "Gemma4ForCausalLM": {
        "layer_output_scale.weight": "layer_scalar",
        "ffn_gate_inp.scale": "router.scale",
        "ffn_down_exps.scale": "router.per_expert_scale",
        "ffn_gate_up_exps.weight": "experts.gate_up_proj",
        "ffn_down_exps.weight": "experts.down_proj",
    },
}
# Experts that GGUF stacks into one tensor, and Hugging Face stores one by one.
_EXPERTS: dict[str, dict[str, str]] = {
    "MixtralForCausalLM": {
        "ffn_gate_exps.weight": "block_sparse_moe.experts.{}.w1.weight",
        "ffn_down_exps.weight": "block_sparse_moe.experts.{}.w2.weight",
        "ffn_up_exps.weight": "block_sparse_moe.experts.{}.w3.weight",
    },
    "Qwen3MoeForCausalLM": {
        "ffn_gate_exps.weight": "mlp.experts.{}.gate_proj.weight",
        "ffn_down_exps.weight": "mlp.experts.{}.down_proj.weight",
        "ffn_up_exps.weight": "mlp.experts.{}.up_proj.weight",
    },
}
_LAYER = re.compile(r"blk\.(?P<layer>\d{1,5})\.(?P<tensor>(?P<part>\w+)\.(?P<suffix>weight|bias|scale))")


def hf_names(stored: str, architecture: str, count: int) -> list[str]:
    """Return a tensor's name; one per expert if it stacks `count` experts that are stored one by one there.

    Args:
        architecture: As in config.json.
        count: Rows of the tensor's first dimension.
    Returns:
        The name as it is if the architecture has no such tensor.
    """
    if (match := _LAYER.fullmatch(stored)) is None:
        return [_WHOLE.get(stored, stored)]
    prefix, tensor = f"model.layers.{match['layer']}.", match["tensor"]
    if (expert := _EXPERTS.get(architecture, {}).get(tensor)) is not None:
        return [prefix + expert.format(index) for index in range(count)]
    if (whole := _TENSORS.get(architecture, {}).get(tensor)) is not None:
        return [prefix + whole]
    part = _PARTS.get(architecture, {}).get(match["part"], _COMMON.get(match["part"]))
    return [stored if part is None else f"{prefix}{part}.{match['suffix']}"]
