"""GGUF files for tests, written by the gguf package from transformers' models as llama.cpp's converter would."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MixtralForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3moe",
    "Gemma4ForCausalLM": "gemma4",
}
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
}
_GEMMA4_NAMES = {
    **_NAMES,
    "model.embed_tokens_per_layer": "per_layer_token_embd",
    "model.per_layer_model_projection": "per_layer_model_proj",
    "model.per_layer_projection_norm": "per_layer_proj_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "pre_feedforward_layernorm_2": "pre_ffw_norm_2",
    "post_feedforward_layernorm": "post_ffw_norm",
    "post_feedforward_layernorm_1": "post_ffw_norm_1",
    "post_feedforward_layernorm_2": "post_ffw_norm_2",
    "per_layer_input_gate": "inp_gate",
    "per_layer_projection": "proj",
    "post_per_layer_input_norm": "post_norm",
    "router.proj": "ffn_gate_inp",
}
_GEMMA4_TENSORS = {
    "layer_scalar": "layer_output_scale.weight",
    "router.scale": "ffn_gate_inp.scale",
    "router.per_expert_scale": "ffn_down_exps.scale",
    "experts.gate_up_proj": "ffn_gate_up_exps.weight",
    "experts.down_proj": "ffn_down_exps.weight",
}


Kind = gguf.GGMLQuantizationType


def write(model: Any, path: Path, kind_of: Callable[[str], Kind] = lambda _: Kind.F32) -> Path:
    """Write a model of transformers; matrices in the kind for their name in transformers, vectors in float32."""
    architecture = ARCHITECTURES[type(model).__name__]
    # A config whose layers differ refuses to read what differs.
    config = SimpleNamespace(**model.config.to_dict()) if architecture == "gemma4" else model.config
    writer = gguf.GGUFWriter(path, architecture)
    _add_settings(writer, config)
    if architecture == "gemma4":
        _add_gemma4_settings(writer, config)
    _add_tokens(writer, config.vocab_size)
    for name, (original, tensor) in _tensors(model, architecture).items():
        values, kind = tensor.detach().float().numpy(), kind_of(original)
        if tensor.ndim < 2 or kind == Kind.F32:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_settings(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    if not getattr(config, "use_double_wide_mlp", False):
        writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    if writer.arch != "gemma4":
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if writer.arch != "gemma4":
        writer.add_key_length(head_dim)
        writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if width := getattr(config, "moe_intermediate_size", None):
        writer.add_expert_feed_forward_length(width)
    if experts := getattr(config, "num_local_experts", 0) if writer.arch != "gemma4" else 0:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)


def _add_gemma4_settings(writer: gguf.GGUFWriter, config: Any) -> None:
    sliding = [kind == "sliding_attention" for kind in config.layer_types]
    first_shared = config.num_hidden_layers - config.num_kv_shared_layers
    writer.add_shared_kv_layers(config.num_kv_shared_layers)
    writer.add_embedding_length_per_layer_input(config.hidden_size_per_layer_input)
    writer.add_sliding_window(config.sliding_window)
    writer.add_sliding_window_pattern(sliding)
    layers = [{**vars(config), **config.per_layer_config.get(str(layer), {})} for layer in range(len(sliding))]
    heads = [layer["num_key_value_heads"] for layer in layers]
    writer.add_head_count_kv(heads if len(set(heads)) > 1 else heads[0])
    writer.add_key_length(layers[sliding.index(False)]["head_dim"])
    writer.add_key_length_swa(config.head_dim)
    if config.use_double_wide_mlp:
        width = config.intermediate_size
        writer.add_feed_forward_length([width * (1 + (layer >= first_shared)) for layer in range(len(sliding))])
    writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_rope_freq_base(config.rope_parameters["full_attention"]["rope_theta"])
    writer.add_float32("gemma4.rope.freq_base_swa", config.rope_parameters["sliding_attention"]["rope_theta"])
    if config.enable_moe_block:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.top_k_experts)


def _add_tokens(writer: gguf.GGUFWriter, vocab_size: int) -> None:
    """Add a byte-level vocabulary: three control tokens, then letters."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    tokens = ["<pad>", "<s>", "</s>", *(chr(0x100 + index) for index in range(vocab_size - 3))]
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (vocab_size - 3))
    writer.add_token_merges(["Ā ā"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _tensors(model: Any, architecture: str) -> dict[str, tuple[str, Tensor]]:
    """Return name -> transformers' name, and the tensor."""
    config = model.config
    heads: dict[str, int] = {}
    if architecture == "llama":
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    tensors: dict[str, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        prefix, inner = "", name
        if name.startswith("model.layers."):
            _, _, layer, inner = name.split(".", 3)
            prefix = f"blk.{layer}."
        if architecture == "gemma4" and inner in _GEMMA4_TENSORS:
            tensors[prefix + _GEMMA4_TENSORS[inner]] = name, tensor
            continue
        module, _, suffix = inner.rpartition(".")
        if ".experts" in f".{module}":
            tensors.update({key: (name, part) for key, part in _experts(prefix, suffix, tensor).items()})
            continue
        part = (_GEMMA4_NAMES if architecture == "gemma4" else _NAMES)[module]
        ordered = _interleaved(tensor, heads[part]) if part in heads else tensor
        tensors[f"{prefix}{part}.{suffix}"] = name, ordered
    rope = model.model.rotary_emb
    if architecture == "gemma4":
        rotated = rope.full_attention_inv_freq != 0
        tensors["rope_freqs.weight"] = "rope_freqs", torch.where(rotated, 1.0, 1e30)
    elif config.rope_parameters.get("rope_type") == "llama3":
        theta, head_dim = config.rope_parameters["rope_theta"], 2 * len(rope.inv_freq)
        plain = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
        tensors["rope_freqs.weight"] = "rope_freqs", plain / rope.inv_freq
    return tensors


def _experts(prefix: str, suffix: str, tensor: Tensor) -> dict[str, Tensor]:
    """Return the stacked tensors of GGUF from those of transformers 5, which fuses gate and up."""
    if suffix == "down_proj":
        return {f"{prefix}ffn_down_exps.weight": tensor}
    gate, up = tensor.chunk(2, dim=1)
    return {f"{prefix}ffn_gate_exps.weight": gate.contiguous(), f"{prefix}ffn_up_exps.weight": up.contiguous()}


def _interleaved(tensor: Tensor, heads: int) -> Tensor:
    """Reorder rows as llama.cpp's converter does for Llama: each rotated pair becomes neighbours."""
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def random_blocks(kind: gguf.GGMLQuantizationType, rows: int, columns: int) -> np.ndarray:
    """Return random blocks [rows, bytes of a row]; no scale in them is NaN or infinite."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(kind.value)
    data = generator.integers(0, 256, (rows, columns // block * block_bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        while not np.isfinite(gguf.dequantize(data, kind)).all():
            data &= 0b10111111  # the upper bit of a float16's exponent, wherever one may be
    return data
