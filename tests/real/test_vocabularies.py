"""Random weights round real tokenizers: vocabularies of 152k and 262k tokens through the whole server."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.server.helpers import ask
from trio_llm.assemble import open_engine
from trio_llm.config import Config, EngineConfig
from trio_llm.server.app import create_app

HIDDEN, LAYERS, INNER, HEADS, KV_HEADS = 32, 2, 64, 4, 2
SHAPES = {"qwen3": (151_936, 151_645), "gemma3": (262_144, 106)}  # rows of the model, end of a turn


def write_checkpoint(directory: Path, files: Path, vocab_size: int, eos: int) -> None:
    """Write a Llama checkpoint of random weights beside a tokenizer's files."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(files / name, directory / name)
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "num_hidden_layers": LAYERS,
        "intermediate_size": INNER, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "vocab_size": vocab_size, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
        "tie_word_embeddings": True, "hidden_act": "silu", "dtype": "float32", "eos_token_id": eos,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
        "self_attn.v_proj": (HIDDEN // 2, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER),
    }  # fmt: skip
    tensors = {
        "model.embed_tokens.weight": torch.randn(vocab_size, HIDDEN, generator=generator) * 0.2,
        "model.norm.weight": torch.ones(HIDDEN),
    }
    for layer in range(LAYERS):
        for name, shape in shapes.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = torch.randn(shape, generator=generator) * 0.2
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = torch.ones(HIDDEN)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(params=list(SHAPES))
async def app(request: Any, tokenizer_files: Callable[[str], Path], tmp_path: Path) -> AsyncIterator[Any]:
    """Serve a checkpoint of one of the vocabularies."""
    write_checkpoint(tmp_path, tokenizer_files(request.param), *SHAPES[request.param])
    config = Config(engine=EngineConfig(model=str(tmp_path), num_kv_blocks=600, max_batch_size=8))
    async with open_engine(config) as engine:
        yield create_app(engine, config)


async def chat(app: Any, **body: Any) -> dict[str, Any]:
    """Ask for an answer and return its only choice."""
    answer = await ask(app, "POST", "/v1/chat/completions", {"temperature": 0.8, "seed": 1, **body})
    assert answer.status == 200, answer.body
    (choice,) = answer.json()["choices"]
    return choice


SCHEMA = {
    "type": "object",
    "properties": {
        "n": {"type": "integer"},
        "kind": {"enum": ["a", "b"]},
        "ok": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["n", "kind", "ok"],
    "additionalProperties": False,
}


@pytest.mark.slow
async def test_structured_output_and_long_chats(app: Any) -> None:
    """A schema holds a random model over all of its tokens, and a chat goes on for twenty turns over HTTP."""
    user = {"role": "user", "content": "hi"}
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA, "strict": True}}
    quiet = {"chat_template_kwargs": {"enable_thinking": False}}
    held = await chat(app, messages=[user], response_format=form, max_tokens=200, logit_bias={}, **quiet)
    if held["finish_reason"] == "stop":
        assert set(json.loads(held["message"]["content"])) == {"n", "kind", "ok"}
    else:
        assert held["message"]["content"].lstrip().startswith("{")
    named = await chat(app, messages=[user], structured_outputs={"choice": ["yes", "no"]}, max_tokens=10, **quiet)
    assert (named["message"]["content"] in ("yes", "no"), named["finish_reason"]) == (True, "stop")
    spelled = {"choice": ["<tool_call>", "</think><unused7>"]}  # Tokens of their own, which text must not become.
    named = await chat(app, messages=[user], structured_outputs=spelled, max_tokens=20, **quiet)
    assert (named["message"]["content"] in spelled["choice"], named["finish_reason"]) == (True, "stop")
    # Qwen's file does not call the tokens round a call special.
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"enum": [1]}}}}}
    calls: dict[str, Any] = {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}
    called = await chat(app, messages=[user], max_tokens=400, temperature=0, **calls, **quiet)
    assert [call["function"]["name"] for call in called["message"]["tool_calls"]] == ["f"]
    turns: list[dict[str, Any]] = []
    for turn in range(20):
        turns.append({"role": "user", "content": f"turn {turn} <|im_end|><end_of_turn> é🤗"})
        said = await chat(app, messages=turns, max_tokens=6, ignore_eos=True, **quiet)
        assert said["finish_reason"] == "length"
        turns.append({"role": "assistant", "content": said["message"]["content"]})
