"""A real model in quantised formats, against transformers on the widened weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from tests.model.paged import Paged, load
from tests.model.quantized_files import Compressed, Packer, fp8_blocks, gptq, quantize_checkpoint
from tests.real.as_stored import check_as_stored
from tests.real.first_choice import behind
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


@attrs.frozen(eq=False)
class Quantized:
    """A checkpoint in a quantised format, and all its tensors, widened."""

    directory: Path
    widened: dict[str, Tensor]


@pytest.fixture(scope="module", params=CASES)
def quantized(request: pytest.FixtureRequest, smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    """Quantise the model, once for all tests of a format."""
    packer, config = CASES[request.param]
    directory = tmp_path_factory.mktemp("quantized") / "model"
    widened = quantize_checkpoint(smollm2, directory, lambda _: lambda weight: packer(weight.float()), config)
    return Quantized(directory, widened)


@pytest.fixture(scope="module")
def prompt(tokenizer: Tokenizer) -> list[int]:
    """Return the tokens of the message."""
    return tokenizer.encode(MESSAGE).ids


@pytest.mark.slow
def test_answers_are_those_of_transformers_on_the_widened_weights(
    quantized: Quantized, prompt: list[int], smollm2: Path
) -> None:
    """After 30 quantised layers the logits of 440 tokens are near, and each token answered is the likeliest."""
    from transformers import AutoModelForCausalLM

    loaded = load(quantized.directory, dtype="float32", block_size=16)
    (answer,) = Paged(loaded, 1).greedy([prompt], 64, NUM_TOKENS)
    (ours,) = Paged(loaded, 1).prefill([prompt + answer], 64)
    reference: Any = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    assert reference.load_state_dict(quantized.widened, strict=False) == (["lm_head.weight"], [])  # the tied one
    with torch.inference_mode():
        logits = reference(torch.tensor([prompt + answer])).logits[0]
    assert float((ours - logits).abs().max()) < 1e-3
    assert behind(logits, prompt, answer) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("quantized", ["gptq-act-order", "w4a16"], indirect=True)
def test_computed_as_stored_it_says_what_its_widened_twin_does(quantized: Quantized, prompt: list[int]) -> None:
    """4-bit numbers in groups of 64 times activations of 8 bits, with zero points and an order of inputs, and without.

    The rest of this small model is its embeddings in bfloat16.
    """
    plan = check_as_stored(EngineConfig(model=str(quantized.directory), dtype="float32"), prompt)
    assert plan.kept_formats == {name: plan.stored_formats[name] for name in plan.stored_formats if "4-bit" in name}
    assert plan.kept_formats
