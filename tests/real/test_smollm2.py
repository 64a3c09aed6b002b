"""A real model in float32 at the lengths of real use, served over HTTP, against transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from tests.model_runner.test_sampler import assert_agrees
from tests.real.corpus import QUESTIONS
from tests.real.first_choice import behind
from tests.real.llama_cpp import chat
from tests.server.process import ServerProcess, serving
from trio_llm.params import SamplingParams

# Where the reference's two likeliest tokens are nearer than this, float32 leaves open which of them comes first.
NEAR_TIE = 1e-4
EOS = 2
NUM_TOKENS = 500
# Sixteen answers need 516 blocks: one of them is preempted near its end. Prompts come in two chunks.
FLAGS = "--dtype float32 --cpu-threads 1 --max-num-seqs 16 --kv-blocks 500 --long-prefill-token-threshold 16".split()


@pytest.fixture(scope="module")
def server(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Serve the checkpoint."""
    with serving(str(smollm2), *FLAGS, "--data-dir", str(tmp_path_factory.mktemp("served") / "data")) as server:
        yield server


def test_answers_as_the_published_model(server: ServerProcess) -> None:
    """The checkpoint is the published model, not only something that the reference reads the same way."""
    question = {"role": "user", "content": QUESTIONS[0]}
    answer = server.ask("/v1/chat/completions", messages=[question], temperature=0, max_tokens=16)
    assert answer["choices"][0]["message"]["content"] == "The capital of France is Paris."


HOT = {"ignore_eos": True}
# Every parameter that changes which token is sampled, by itself and with others.
WISHES: list[Mapping[str, Any]] = [
    {"temperature": 0, **HOT},
    {"temperature": 0, **HOT},
    {"seed": 1, **HOT},
    {"seed": 2, "temperature": 0.6, "top_p": 0.9, **HOT},
    {"seed": 3, "top_k": 40, **HOT},
    {"seed": 4, "min_p": 0.05, "temperature": 1.5, **HOT},
    {"seed": 5, "frequency_penalty": 0.5, **HOT},
    {"seed": 6, "presence_penalty": 1.0, "top_p": 0.95, **HOT},
    {"temperature": 0, "repetition_penalty": 1.15, **HOT},
    {
        "seed": 7, "repetition_penalty": 1.1, "frequency_penalty": 0.2, "presence_penalty": -0.3, "top_k": 200, **HOT
    },
    {"seed": 8, "logit_bias": {28: 4.0, 30: -100.0, 253: 2.0}, **HOT},
    {"seed": 9, "bad_words": ["the", "a fox", "in a forest"], **HOT},
    {"seed": 10, "allowed_token_ids": range(100, 9000), **HOT},
    {"seed": 11, "temperature": 0.8, "min_tokens": NUM_TOKENS, "stop_token_ids": (30, 198)},
    {"seed": 12, "temperature": 0.01, **HOT},
    {"seed": 13, "temperature": 2.0, "top_k": 2000, "top_p": 0.8, "min_p": 0.001, "frequency_penalty": 1.0, **HOT},
]  # fmt: skip
MIXED = 9


def params_of(wish: Mapping[str, Any], tokenizer: Tokenizer) -> SamplingParams:
    """Return what a request's fields mean: each bad word is one with and without a space before it."""
    fields = {name: value for name, value in wish.items() if name != "bad_words"}
    words = [text for word in wish.get("bad_words", ()) for text in (word, f" {word}")]
    return SamplingParams(**fields, bad_words_token_ids=tuple(tuple(tokenizer.encode(text).ids) for text in words))


def body_of(prompt: list[int], wish: Mapping[str, Any], num_tokens: int) -> dict[str, Any]:
    """Return a request for a completion and its token ids."""
    lists = {name: list(value) for name, value in wish.items() if isinstance(value, range)}
    return {"prompt": prompt, "max_tokens": num_tokens, "return_token_ids": True, **wish, **lists}


@pytest.mark.slow
def test_answers_of_500_tokens_are_those_of_transformers_and_the_reference_sampler(
    server: ServerProcess, tokenizer: Tokenizer, smollm2_reference: Any
) -> None:
    """Sixteen clients at once: each token is what the reference samples from the logits that transformers computes.

    The reference knows one request only, so the same tokens come out alone, and one of them is asked alone, too. Greedy
    answers are compared token by token, the others at every eleventh.
    """
    prompts = [tokenizer.encode(chat(QUESTIONS[at % len(QUESTIONS)])).ids for at in range(len(WISHES))]
    bodies = [body_of(prompt, wish, NUM_TOKENS) for prompt, wish in zip(prompts, WISHES, strict=True)]
    choices = [answer["choices"][0] for answer in server.ask_together("/v1/completions", bodies)]
    assert server.metric("vllm:num_preemptions_total") > 0
    alone = server.ask("/v1/completions", **body_of(prompts[MIXED], WISHES[MIXED], 100))
    assert alone["choices"][0]["token_ids"] == choices[MIXED]["token_ids"][:100]
    for prompt, wish, choice in zip(prompts, WISHES, choices, strict=True):
        answer, params = choice["token_ids"], params_of(wish, tokenizer)
        assert (len(answer), choice["finish_reason"]) == (NUM_TOKENS, "length")
        assert choice["text"] == tokenizer.decode(answer)
        with torch.inference_mode():
            logits = smollm2_reference(torch.tensor([prompt + answer])).logits[0]
        if wish == WISHES[0]:
            assert behind(logits, prompt, answer) < NEAR_TIE
        for at in range(params.seed or 0, NUM_TOKENS, 11):
            row = (params, tuple(prompt), tuple(answer[:at]))
            assert_agrees(logits[len(prompt) - 1 + at].numpy(), row, answer[at], eos=[EOS], error=NEAR_TIE)
