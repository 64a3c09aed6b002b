"""A real model in quantised formats, against transformers on the widened weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from tests.model.paged import Paged, load
from tests.model.quantized_files import Compressed, Packer, fp8_blocks, gptq, quantize_checkpoint
from tests.real.as_stored import check_as_stored
from trio_llm.config import EngineConfig

_W4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": True, "sym": False}
_GROUPS = {"group_0": {"targets": ["Linear"], "weights": _W4}}
CASES: dict[str, tuple[Packer, dict[str, Any]]] = {
    "gptq-act-order": (gptq(act_order=True, symmetric=False, group_size=64), _GPTQ),
    "w4a16": (
        Compressed("pack-quantized", _W4),
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": _GROUPS},
    ),
    "fp8": (fp8_blocks(128, 128), {"quant_method": "fp8", "weight_block_size": [128, 128]}),
}
QUESTION = "Name the fox of this story, and say where it lives. "
STORY = " ".join(
    f"On day {day} the fox walked {day * 7} steps along the river and met a heron." for day in range(1, 20)
)
MESSAGE = f"<|im_start|>user\n{QUESTION}{STORY}<|im_end|>\n<|im_start|>assistant\n"
NUM_TOKENS = 24


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_answers_are_those_of_transformers_on_the_widened_weights(case: str, smollm2: Path, tmp_path: Path) -> None:
    """After 30 quantised layers the logits of 440 tokens are near, and each token answered is the likeliest."""
    from transformers import AutoModelForCausalLM

    packer, config = CASES[case]
    widened = quantize_checkpoint(smollm2, tmp_path / "model", lambda _: lambda weight: packer(weight.float()), config)
    shutil.copytree(smollm2, tmp_path / "twin", ignore=shutil.ignore_patterns("*.safetensors", "*.gguf"))
    save_file({name: t.float() for name, t in widened.items()}, tmp_path / "twin/model.safetensors", {"format": "pt"})
    loaded = load(tmp_path / "model", dtype="float32", block_size=16)
    prompt = Tokenizer.from_file(str(smollm2 / "tokenizer.json")).encode(MESSAGE).ids
    (answer,) = Paged(loaded, 1).greedy([prompt], 64, NUM_TOKENS)
    (ours,) = Paged(loaded, 1).prefill([prompt + answer], 64)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "twin", dtype=torch.float32)
    with torch.inference_mode():
        logits = reference(torch.tensor([prompt + answer])).logits[0]
    assert float((ours - logits).abs().max()) < 1e-3
    chosen = logits[len(prompt) - 1 : -1].gather(1, torch.tensor(answer)[:, None])[:, 0]
    assert float((logits[len(prompt) - 1 : -1].amax(-1) - chosen).max()) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("case", ["gptq-act-order", "w4a16"])
def test_computed_as_stored_it_says_what_its_widened_twin_does(case: str, smollm2: Path, tmp_path: Path) -> None:
    """4-bit numbers in groups of 64 times activations of 8 bits, with zero points and an order of inputs, and without.

    The rest of this small model is its embeddings in bfloat16.
    """
    packer, config = CASES[case]
    quantize_checkpoint(smollm2, tmp_path / "model", lambda _: lambda weight: packer(weight.float()), config)
    prompt = Tokenizer.from_file(str(smollm2 / "tokenizer.json")).encode(MESSAGE).ids
    plan = check_as_stored(EngineConfig(model=str(tmp_path / "model"), dtype="float32"), prompt)
    assert plan.kept_formats == {name: plan.stored_formats[name] for name in plan.stored_formats if "4-bit" in name}
    assert plan.kept_formats
