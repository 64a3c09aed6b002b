"""Contexts of 8,000 tokens with a vocabulary of real size: a small random model, the same for us and transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model_runner.drive import run
from tests.real.first_choice import behind
from trio_llm.config import EngineConfig
from trio_llm.model.load import load_runner
from trio_llm.model.runner import Runner
from trio_llm.params import SamplingParams

CONTEXT, VOCAB = 8192, 32_000
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def model() -> Any:
    """Return transformers' model, two layers deep."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def runner(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """Return ours, with room for two of the longest sequences."""
    directory: Path = tmp_path_factory.mktemp("long")
    model.save_pretrained(directory)
    return load_runner(EngineConfig(model=str(directory), dtype="float32", num_kv_blocks=1100, max_batch_size=4))


@pytest.mark.slow
def test_greedy_at_8000_tokens_is_that_of_transformers_however_it_is_scheduled(model: Any, runner: Runner) -> None:
    """Chunks, a cached prefix and preemption change no token near the end of the context, up to its last position."""
    generator = torch.Generator().manual_seed(3)
    base = torch.randint(3, VOCAB, (CONTEXT,), generator=generator).tolist()
    # The second shares 8,000 tokens with the first, the third ends where the context does.
    prompts = [base[:8100], [*base[:8000], 5, 6, 7], base[: CONTEXT - 24]]
    requests = [(prompt, GREEDY) for prompt in prompts]
    whole = run(runner, requests, caching=False, chunk=2048, batch_size=1)
    for prompt, answer in zip(prompts, whole.token_ids, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + answer]), logits_to_keep=25).logits[0]
        assert behind(logits, prompt[-1:], answer) < 1e-4
    cached = run(runner, requests, chunk=700, batch_size=1)
    assert cached.hit_tokens > 15_000
    assert cached.token_ids == whole.token_ids
    crowded = run(runner, requests[:2], chunk=1000, caching=False, num_blocks=1010)
    assert crowded.num_preempted > 0
    assert crowded.token_ids == whole.token_ids[:2]
