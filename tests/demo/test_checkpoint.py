"""The committed checkpoints are what the model card says, and transformers reads them as ordinary Qwen3 models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tools.demo_model.checkpoint import load
from tools.demo_model.corpus_grammar import IM_END
from tools.demo_model.evaluate import answers_exactly, evaluate, prompt_of
from tools.demo_model.questions import QUESTIONS
from trio_llm.demo import demo_model_path, draft_model_path

MIB = 2**20


def test_importing_the_package_loads_nothing() -> None:
    """Asking where the model lies imports neither torch nor tokenizers."""
    code = (
        "import sys; from trio_llm.demo import demo_model_path as path; assert path().is_dir();"
        "assert not {'torch', 'tokenizers', 'safetensors', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_both_fit_into_the_package() -> None:
    """Model and draft take at most 16 MB together, are bfloat16, and have 1 to 4 million and fewer parameters."""
    files = [path for directory in (demo_model_path(), draft_model_path()) for path in directory.iterdir()]
    assert sum(path.stat().st_size for path in files) <= 16 * MIB
    sizes: list[int] = []
    for directory in (demo_model_path(), draft_model_path()):
        with safe_open(directory / "model.safetensors", "pt") as weights:
            tensors = [weights.get_tensor(name) for name in weights.keys()]  # noqa: SIM118
        assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
        sizes.append(sum(tensor.numel() for tensor in tensors))
    assert 1e6 <= sizes[0] <= 4e6 and sizes[1] < sizes[0] / 2


def test_the_draft_has_the_same_tokenizer() -> None:
    """A draft's tokens can be verified only if both speak the same ids."""
    ours, drafts = [(path() / "tokenizer.json").read_bytes() for path in (demo_model_path, draft_model_path)]
    assert ours == drafts


def test_scores_are_those_of_the_card() -> None:
    """Plain PyTorch answers all twenty questions of every topic exactly, and the model card says so."""
    scores = evaluate(demo_model_path())
    card = (demo_model_path() / "README.md").read_text()
    for topic, score in scores.items():
        assert f"| {topic} | {score} |" in card
    assert set(scores.values()) == {"20/20"}


@pytest.mark.parametrize("directory", [demo_model_path(), draft_model_path()], ids=["model", "draft"])
def test_transformers_agrees(directory: Path) -> None:
    """Transformers loads the checkpoint as Qwen3ForCausalLM, and its greedy answers are those of the training code."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network, tokenizer = load(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    assert type(model).__name__ == json.loads((directory / "config.json").read_text())["architectures"][0]
    reference = AutoTokenizer.from_pretrained(directory)
    for topic in ("capitals", "json", "repeat"):
        for messages, _ in QUESTIONS[topic][:5]:
            prompt = prompt_of(messages)
            assert reference.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == prompt
            prompt_ids = reference(prompt).input_ids
            assert prompt_ids == tokenizer.encode(prompt).ids
            output = model.generate(torch.tensor([prompt_ids]), max_new_tokens=64, do_sample=False)
            answer = reference.decode(output[0][len(prompt_ids) :])
            assert answer.endswith(IM_END)
            assert answers_exactly(network, tokenizer, prompt, answer)
