"""SmolLM2's GGUF file of 4-bit blocks beside llama.cpp, whose answers llama_cpp.py recorded."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.real.corpus import PROSE, QUESTIONS, TEXTS
from tests.real.llama_cpp import NUM_TOKENS, RECORD, chat
from tests.real.smollm2 import GGUF_NAME
from tests.server.process import ServerProcess
from trio_llm.tokenizer import Tokenizer

# Both round activations to 8 bits, but not at the same places: two tokens this near in log-probability may change
# places.
NEAR_TIE = 0.25


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    """Return what llama.cpp said."""
    return json.loads(RECORD.read_text())


def test_ids_are_those_of_llama_cpp(record: dict[str, Any], smollm2: Path) -> None:
    """Each text of the corpus has the ids that llama.cpp gives it."""
    tokenizer = Tokenizer.from_directory(smollm2 / GGUF_NAME)
    for text, ids in zip(TEXTS, record["ids"], strict=True):
        assert tokenizer.encode(text) == ids, text


@pytest.mark.slow
def test_perplexity_is_that_of_llama_cpp(record: dict[str, Any], gguf_server: ServerProcess) -> None:
    """Over a text of some 500 tokens it differs by less than 0.5 percent."""
    asked = {"prompt": PROSE, "max_tokens": 1, "prompt_logprobs": 0, "return_token_ids": True}
    (choice,) = gguf_server.ask("/v1/completions", **asked)["choices"]
    entries = zip(choice["prompt_token_ids"][1:], choice["prompt_logprobs"][1:], strict=True)
    losses = [-entry[str(token)]["logprob"] for token, entry in entries]
    assert len(losses) > 400
    assert abs(math.exp(sum(losses) / len(losses) - record["loss"]) - 1) < 0.005


@pytest.mark.slow
def test_greedy_answers_part_from_llama_cpps_at_near_ties_only(
    record: dict[str, Any], gguf_server: ServerProcess, smollm2_reference: Any
) -> None:
    """Up to the first token that differs the answers are the same; there the two tokens are nearly as likely."""
    prompts = [chat(question) for question in QUESTIONS]
    asked = {"prompt": prompts, "temperature": 0, "max_tokens": NUM_TOKENS, "return_token_ids": True}
    choices = gguf_server.ask("/v1/completions", **asked)["choices"]
    agreed = 0
    for choice, theirs in zip(choices, record["answers"], strict=True):
        ours = choice["token_ids"]
        at = next((at for at, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
        agreed += len(ours) if at is None else at
        if at is None:
            continue
        prompt = [*choice["prompt_token_ids"], *ours[:at]]
        with torch.inference_mode():
            logits = smollm2_reference(torch.tensor([prompt])).logits[0, -1]
        assert abs(float(logits[ours[at]] - logits[theirs[at]])) < NEAR_TIE
    assert agreed > NUM_TOKENS  # of four answers
