"""A real model at the lengths of real use, through the real scheduler, block manager and runner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from tokenizers import Tokenizer

from tests.model_runner.drive import least_blocks, run
from tests.model_runner.test_sampler import assert_agrees
from trio_llm.config import EngineConfig
from trio_llm.model.load import load_runner
from trio_llm.model.runner import Runner
from trio_llm.params import SamplingParams

# Where the reference's two likeliest tokens are nearer than this, float32 leaves open which of them comes first.
NEAR_TIE = 1e-4


@pytest.fixture(scope="module")
def runner(smollm2: Path) -> Runner:
    """Return a runner in float32 with room for sixteen answers."""
    return load_runner(EngineConfig(model=str(smollm2), dtype="float32", num_kv_blocks=1200, max_batch_size=16))


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Tokenizer:
    """Return the model's tokenizer."""
    return Tokenizer.from_file(str(smollm2 / "tokenizer.json"))


def chat(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return a user's message as the model's chat template writes it."""
    return tokenizer.encode(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n").ids


def test_answers_as_the_published_model(runner: Runner, tokenizer: Tokenizer) -> None:
    """The checkpoint is the published model, not only something that the reference reads the same way."""
    prompt = chat(tokenizer, "What is the capital of France?")
    (answer,) = run(runner, [(prompt, SamplingParams(temperature=0, max_tokens=16))]).token_ids
    assert tokenizer.decode(answer) == "The capital of France is Paris."


HOT = {"max_tokens": 500, "ignore_eos": True}
# Every parameter that changes which token is sampled, by itself and with others.
WISHES = [
    SamplingParams(temperature=0, **HOT),
    SamplingParams(temperature=0, **HOT),
    SamplingParams(seed=1, **HOT),
    SamplingParams(seed=2, temperature=0.6, top_p=0.9, **HOT),
    SamplingParams(seed=3, top_k=40, **HOT),
    SamplingParams(seed=4, min_p=0.05, temperature=1.5, **HOT),
    SamplingParams(seed=5, frequency_penalty=0.5, **HOT),
    SamplingParams(seed=6, presence_penalty=1.0, top_p=0.95, **HOT),
    SamplingParams(temperature=0, repetition_penalty=1.15, **HOT),
    SamplingParams(seed=7, repetition_penalty=1.1, frequency_penalty=0.2, presence_penalty=-0.3, top_k=200, **HOT),
    SamplingParams(seed=8, logit_bias={28: 4.0, 30: -100.0, 253: 2.0}, **HOT),
    SamplingParams(seed=9, bad_words_token_ids=((260,), (253, 1990), (281, 253, 260)), **HOT),
    SamplingParams(seed=10, allowed_token_ids=tuple(range(100, 9000)), **HOT),
    SamplingParams(seed=11, temperature=0.8, min_tokens=500, stop_token_ids=(30, 198), max_tokens=500),
    SamplingParams(seed=12, temperature=0.01, **HOT),
    SamplingParams(seed=13, temperature=2.0, top_k=2000, top_p=0.8, min_p=0.001, frequency_penalty=1.0, **HOT),
]
TEXTS = [
    "Tell me a long story about a fox.",
    "Write Python code that sorts a list in five ways.",
    "What is the capital of France?",
    "List ten animals and say something about each.",
]


@pytest.mark.slow
def test_answers_of_500_tokens_are_those_of_transformers_and_the_reference_sampler(
    runner: Runner, tokenizer: Tokenizer, smollm2_reference: Any
) -> None:
    """Sixteen wishes at once: each token is what the reference samples from the logits that transformers computes.

    The reference knows one request only, so the same tokens come out alone. Greedy answers are compared token by
    token, the others at every eleventh.
    """
    prompts = [chat(tokenizer, TEXTS[at % len(TEXTS)]) for at in range(len(WISHES))]
    answers = run(runner, list(zip(prompts, WISHES, strict=True)), chunk=32).token_ids
    for prompt, params, answer in zip(prompts, WISHES, answers, strict=True):
        assert len(answer) == 500
        with torch.inference_mode():
            logits = smollm2_reference(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        if params == WISHES[0]:
            chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
            assert float((logits.amax(-1) - chosen).max()) < NEAR_TIE
        for at in range(params.seed or 0, 500, 11):
            row = (params, tuple(prompt), tuple(answer[:at]))
            assert_agrees(logits[at].numpy(), row, answer[at], eos=runner.info.eos_token_ids, error=NEAR_TIE)


@pytest.mark.slow
def test_an_answer_is_the_same_alone_and_preempted(runner: Runner, tokenizer: Tokenizer) -> None:
    """Company, chunks, a prefix cache and preemptions change no token of an answer."""
    wishes = [attrs.evolve(WISHES[at], max_tokens=150, min_tokens=0) for at in (9, 13, 0)]
    requests = [(chat(tokenizer, TEXTS[at]), wish) for at, wish in enumerate(wishes)]
    (alone,) = run(runner, requests[:1]).token_ids
    crowded = run(runner, requests, chunk=16, num_blocks=least_blocks(runner, 200, 16) + 8)
    assert crowded.num_preempted > 0
    assert crowded.token_ids[0] == alone
