"""The GGUF file of a real model beside its twin in safetensors, which the gguf package wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.model.paged import Paged, load
from tests.parallel.ranks import in_ranks, load_part
from tests.real.as_stored import NEAR_TIE, check_as_stored
from tests.real.first_choice import behind
from tests.real.smollm2 import GGUF_NAME
from tests.real.test_quantized import MESSAGE
from trio_llm.config import EngineConfig
from trio_llm.model.loading.loader import inspect_model, load_model
from trio_llm.model.ops import cpu as native
from trio_llm.model.ops.dispatch import Dispatch, dispatching
from trio_llm.model.parallel.group import Group
from trio_llm.tokenizer import Tokenizer

TEXTS = (
    "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\nHow much is 12345 + 678?<|im_end|>\n",
    "Naïve café, 日本語, Ελληνικά, 🙂🙃 and\ttabs,\r\n  two  spaces\n\n\n",
    "def f(x):\n    return {'a': [1, 2.5e-3]}  # it's, we'll, I'D\n",
    " " * 50 + "end" + "\n" * 30,
)


@pytest.fixture(scope="module")
def gguf_file(smollm2: Path) -> Path:
    """Return the file beside its twin."""
    return smollm2 / GGUF_NAME


def test_ids_are_those_of_the_twin(gguf_file: Path, smollm2: Path) -> None:
    """Byte-level BPE of 49,152 tokens: the metadata gives the ids of tokenizer.json, and the same template."""
    ours, twin = (Tokenizer.from_directory(path) for path in (gguf_file, smollm2))
    for text in TEXTS:
        assert ours.encode(text) == twin.encode(text)
        assert ours.decode(ours.encode(text), skip_special_tokens=False) == text
    assert ours.chat_template == twin.chat_template
    assert (ours.vocab_size, ours.special_tokens) == (twin.vocab_size, twin.special_tokens)


def test_weights_are_those_of_the_twin(gguf_file: Path, smollm2: Path) -> None:
    """All 30 layers, widened to bfloat16, are bit for bit the twin's; eos ids, context and heads agree."""
    plans = [inspect_model(EngineConfig(model=str(path), dtype="bfloat16")) for path in (gguf_file, smollm2)]
    assert plans[0].eos_token_ids == plans[1].eos_token_ids
    assert plans[0].max_model_len == plans[1].max_model_len == 8192
    ours, twin = (load_model(plan, torch.device("cpu")).model for plan in plans)
    assert torch.equal(ours.embed.weight, twin.embed.weight)  # type: ignore[attr-defined]
    for mine, theirs in zip(ours.layers, twin.layers, strict=True):  # type: ignore[attr-defined]
        assert torch.equal(mine.attention.qkv.weight, theirs.attention.qkv.weight)
        assert torch.equal(mine.attention.out.weight, theirs.attention.out.weight)
        assert torch.equal(mine.mlp.gate_up.weight, theirs.mlp.gate_up.weight)
        assert torch.equal(mine.mlp.down.weight, theirs.mlp.down.weight)


def test_computed_as_stored_it_says_what_its_widened_twin_does(gguf_file: Path) -> None:
    """Blocks times activations of 8 bits, in a format for most matrices and another one for the rest."""
    settings = EngineConfig(model=str(gguf_file), dtype="float32")
    plan = check_as_stored(settings, Tokenizer.from_directory(gguf_file).encode(MESSAGE))
    assert set(plan.kept_formats) == {"Q4_1", "Q8_0"}
    assert plan.weight_bytes < 1.01 * plan.stored_bytes


def test_ranks_compute_their_parts_as_stored(gguf_file: Path, tmp_path: Path) -> None:
    """Three of them, as it has nine heads: no token that one process answers is far from their first choice."""
    prompt = Tokenizer.from_directory(gguf_file).encode(MESSAGE)
    (answer,) = Paged(load(gguf_file, dtype="float32"), 1).greedy([prompt], 128, 60)

    def work(group: Group) -> tuple[torch.Tensor, dict[str, int]]:
        with dispatching(Dispatch("native", native, "cpu")):
            part = load_part(gguf_file, group, as_stored=True, dtype="float32")
            (logits,) = Paged(part, 1).prefill([prompt + answer], 128)
            return logits, part.plan.kept_formats

    found = in_ranks(3, tmp_path / "ranks", work)
    assert behind(found[0][0], prompt, answer) < NEAR_TIE
    whole = inspect_model(EngineConfig(model=str(gguf_file)), as_stored=True).kept_formats
    assert {name: 3 * nbytes for name, nbytes in found[0][1].items()} == whole
    assert all(kept == found[0][1] for _, kept in found)
