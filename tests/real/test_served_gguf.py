"""SmolLM2's GGUF file of 4-bit blocks, computed as stored and served over HTTP at the sizes of real use.

Its activations are rounded to 8 bits, so an answer in company may differ from the same answer alone: see
docs/exactness.md. What is held here is what must be true of each answer by itself.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import attrs
import pytest
import torch
from tokenizers import Tokenizer

from tests.real.as_stored import NEAR_TIE
from tests.real.first_choice import behind
from tests.real.long_context import NUM_TOKENS, PART, RECORD, long_text
from tests.server.process import RefusedError, ServerProcess

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
CONTEXT, BLOCK, LONG = 8192, 16, 500
FOX = [{"role": "user", "content": "Tell me a long story about a fox."}]
TOPICS = "a dog, a river, bread, the moon, winter, a train, the sea, a garden, music, a horse".split(", ")


def rendered(messages: list[dict[str, str]]) -> str:
    """Return a conversation as the template of the file writes it."""
    turns = [f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages]
    return "".join([*turns, "<|im_start|>assistant\n"])


def said_of(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """Put a chat's stream together as an answer that is not streamed."""
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    text = "".join(choice["delta"].get("content") or "" for choice in choices)
    return {
        "prompt_token_ids": next(ids for chunk in chunks if (ids := chunk.get("prompt_token_ids"))),
        "usage": chunks[-1]["usage"],
        "choices": [
            {
                "message": {"role": "assistant", "content": text},
                "token_ids": [token for choice in choices for token in choice.get("token_ids") or ()],
                "finish_reason": choices[-1]["finish_reason"],
            }
        ],
    }


def test_the_file_answers(gguf_server: ServerProcess) -> None:
    """The file alone is enough to be served: its tokenizer, its end of turn."""
    prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    (choice,) = gguf_server.ask(COMPLETIONS, prompt=prompt, temperature=0, max_tokens=20)["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("The capital of France is Paris.", "stop")


def test_a_chat_of_twenty_turns(gguf_server: ServerProcess, tokenizer: Tokenizer, smollm2_reference: Any) -> None:
    """Each turn has the prompt of the template and most of it from the cache, whether it is streamed or not.

    Every token answered is the first choice of transformers, on widened weights, or nearly so.
    """
    messages = [{"role": "system", "content": "You answer in a few words."}]
    turns: list[tuple[list[int], list[int]]] = []
    for turn in range(20):
        messages.append({"role": "user", "content": f"Tell me something about {TOPICS[turn % len(TOPICS)]}."})
        body = {"messages": messages, "temperature": 0, "max_tokens": 12, "return_token_ids": True}
        if turn % 2:
            streamed = gguf_server.stream(CHAT, **body, stream_options={"include_usage": True})
            answer = said_of(streamed)
        else:
            answer = gguf_server.ask(CHAT, **body)
        (choice,), usage, prompt = answer["choices"], answer["usage"], answer["prompt_token_ids"]
        assert prompt == tokenizer.encode(rendered(messages)).ids
        assert usage["prompt_tokens"] == len(prompt)
        assert usage["completion_tokens"] == len(choice["token_ids"])
        assert (choice["finish_reason"] == "stop") == (choice["token_ids"][-1] == tokenizer.token_to_id("<|im_end|>"))
        if turns:
            assert usage["prompt_tokens_details"]["cached_tokens"] >= len(turns[-1][0]) // BLOCK * BLOCK
        turns.append((prompt, choice["token_ids"]))
        messages.append(choice["message"])
    whole = turns[-1][0] + turns[-1][1]
    with torch.inference_mode():
        logits = smollm2_reference(torch.tensor([whole])).logits[0]
    compared = 0
    for prompt, answer in turns:
        if whole[: len(prompt) + len(answer)] == prompt + answer:  # else the answer's text has other tokens as a prompt
            assert behind(logits, prompt, answer) < NEAR_TIE
            compared += 1
    assert compared > 15


@pytest.mark.slow
def test_the_whole_context(gguf_server: ServerProcess, tokenizer: Tokenizer) -> None:
    """The perplexity of 8,160 tokens is that of transformers, and an answer goes on to the context's last position."""
    prompt, losses = tokenizer.encode(long_text()).ids, json.loads(RECORD.read_text())["losses"]
    body = {"prompt": prompt[:NUM_TOKENS], "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    measured = gguf_server.ask(COMPLETIONS, **body, max_tokens=1, prompt_logprobs=0)["choices"][0]
    entries = zip(prompt[1:NUM_TOKENS], measured["prompt_logprobs"][1:], strict=True)
    ours = [-entry[str(token)]["logprob"] for token, entry in entries]
    parts = [ours[at : at + PART] for at in range(0, len(ours), PART)]
    for part, loss in zip(parts, losses, strict=True):
        assert abs(sum(part) / len(part) - loss) < 0.02
    expected = sum(len(part) * loss for part, loss in zip(parts, losses, strict=True)) / len(ours)
    assert abs(math.exp(sum(ours) / len(ours) - expected) - 1) < 0.005
    answer = gguf_server.ask(COMPLETIONS, **body, max_tokens=CONTEXT - NUM_TOKENS)
    assert answer["usage"]["total_tokens"] == CONTEXT
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] >= NUM_TOKENS - BLOCK
    assert answer["choices"][0]["finish_reason"] == "length"
    with pytest.raises(RefusedError, match=f"400.*{CONTEXT} tokens"):
        gguf_server.ask(COMPLETIONS, **{**body, "prompt": prompt[:CONTEXT]}, max_tokens=1)


def test_32_clients_at_once(gguf_server: ServerProcess) -> None:
    """Each gets its own continuation: of a line that its prompt has three times, with a number that no other has."""
    numbers = [str(random.Random(client).randrange(10**19, 10**20)) for client in range(32)]
    lines = [(f"The number of client {client} is", f" {number}.") for client, number in enumerate(numbers)]
    bodies = [{"prompt": f"{a}{b}\n" * 3 + a, "temperature": 0, "max_tokens": 40, "stop": ["\n"]} for a, b in lines]
    for (_, rest), answer in zip(lines, gguf_server.ask_together(COMPLETIONS, bodies), strict=True):
        assert answer["choices"][0]["text"] == rest
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert answer["usage"]["completion_tokens"] > 20


@attrs.frozen
class Said:
    """An answer, and of each token its log-probability and those of the twenty likeliest."""

    token_ids: list[int]
    text: str
    finish_reason: str
    stop_reason: Any
    tops: list[tuple[float, list[float]]]

    @property
    def surprise(self) -> float:
        return -sum(chosen for chosen, _ in self.tops) / len(self.tops)

    def all_tokens(self, hold: Callable[[float, list[float]], bool]) -> bool:
        """Say whether something is true of the log-probabilities of all 500 tokens."""
        return len(self.tops) == LONG and all(hold(chosen, tops) for chosen, tops in self.tops)


THE, OF, FOXES, END = 260, 282, 16438, 30  # " the", " of", " fox" and "."
SEEDED, FREE = {"seed": 1}, "plain"
NUM_REPORTED, ENDS = 8, (" the", ",", ".")
ENDS_EARLY, HELD = "late stop", "regex"  # With a grammar, the end of text is allowed where the grammar is complete.
WISHES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    FREE: SEEDED,
    "another seed": {"seed": 2},
    "hot": {**SEEDED, "temperature": 2},
    "cold": {**SEEDED, "temperature": 0.3},
    "top_k": {**SEEDED, "top_k": 5, "temperature": 1.5},
    "top_p": {**SEEDED, "top_p": 0.5},
    "min_p": {**SEEDED, "min_p": 0.2},
    # The log-probabilities of those above are looked at.
    "frequency_penalty": {**SEEDED, "frequency_penalty": 2},
    "presence_penalty": {**SEEDED, "presence_penalty": 2},
    "repetition_penalty": {"temperature": 0, "repetition_penalty": 1.3},
    "logit_bias": {**SEEDED, "logit_bias": {THE: -100, FOXES: 5}},
    "bad_words": {**SEEDED, "bad_words": ["the", "of"]},
    "allowed_token_ids": {**SEEDED, "allowed_token_ids": list(range(100, 9000))},
    HELD: {**SEEDED, "structured_outputs": {"regex": "([a-z]{2,9} ){600}"}},
    ENDS_EARLY: {**SEEDED, "stop": list(ENDS), "min_tokens": 400},
}


@pytest.mark.slow
def test_every_parameter_has_its_effect_among_16(gguf_server: ServerProcess, tokenizer: Tokenizer) -> None:
    """Sixteen chats at once, each with a parameter of its own: what it promises is true of all of its tokens."""
    asked = {"messages": FOX, "max_tokens": LONG, "return_token_ids": True}
    bodies = [{**asked, "ignore_eos": name not in (ENDS_EARLY, HELD), **wish} for name, wish in WISHES.items()]
    for body in bodies[:NUM_REPORTED]:
        body.update(logprobs=True, top_logprobs=20)
    said: dict[str, Said] = {}
    for name, answer in zip(WISHES, gguf_server.ask_together(CHAT, bodies), strict=True):
        (choice,), usage = answer["choices"], answer["usage"]
        reported = (choice["logprobs"] or {"content": []})["content"]
        tops = [(token["logprob"], [top["logprob"] for top in token["top_logprobs"]]) for token in reported]
        ids, text = choice["token_ids"], choice["message"]["content"]
        said[name] = Said(ids, text, choice["finish_reason"], choice.get("stop_reason"), tops)
        assert usage["completion_tokens"] == len(ids)
        assert usage["prompt_tokens"] == len(answer["prompt_token_ids"])
        if name != ENDS_EARLY:
            assert (len(ids), choice["finish_reason"]) == (LONG, "length")
            assert text == tokenizer.decode(ids)
    distinct = {name: len(set(answer.token_ids)) for name, answer in said.items()}
    counts = {name: Counter(answer.token_ids) for name, answer in said.items()}
    assert said["greedy"].all_tokens(lambda chosen, tops: chosen == tops[0])
    assert any(chosen < tops[0] for chosen, tops in said[FREE].tops)
    assert said[FREE].token_ids != said["another seed"].token_ids
    assert said["cold"].surprise < said[FREE].surprise < said["hot"].surprise
    assert said["top_k"].all_tokens(lambda chosen, tops: chosen >= tops[4])
    assert said["top_p"].all_tokens(lambda chosen, tops: sum(math.exp(p) for p in tops if p > chosen) < 0.5001)
    assert said["min_p"].all_tokens(lambda chosen, tops: chosen >= tops[0] + math.log(0.2) - 0.001)
    assert max(counts["frequency_penalty"].values()) < max(counts[FREE].values()) / 2
    assert distinct["presence_penalty"] > distinct[FREE]
    assert distinct["repetition_penalty"] > distinct["greedy"]
    assert (counts["logit_bias"][THE], counts[FREE][THE] > 0) == (0, True)
    assert counts["logit_bias"][FOXES] > counts[FREE][FOXES]
    banned = {tokenizer.token_to_id(word) for word in ("the", "of", "Ġthe", "Ġof")}
    assert banned & set(said["bad_words"].token_ids) == set() != banned & set(said[FREE].token_ids)
    assert set(said["allowed_token_ids"].token_ids) <= set(range(100, 9000))
    assert re.fullmatch("([a-z]{2,9} )*[a-z]{0,9}", said[HELD].text)
    late = said[ENDS_EARLY]
    assert (late.finish_reason, late.stop_reason in ENDS) == ("stop", True)
    assert len(late.token_ids) >= 400


@pytest.mark.slow
def test_a_seed_repeats_an_answer_of_500_tokens(gguf_server: ServerProcess) -> None:
    """Alone, the same request is answered by the same tokens, with all parameters together."""
    everything = {
        "seed": 5, "temperature": 0.9, "top_p": 0.95, "top_k": 100, "min_p": 0.01, "presence_penalty": 0.2,
        "frequency_penalty": 0.3, "repetition_penalty": 1.05, "logit_bias": {END: -1}, "bad_words": ["fox"],
        "ignore_eos": True, "max_tokens": LONG, "return_token_ids": True,
    }  # fmt: skip
    answers = [gguf_server.ask(CHAT, messages=FOX, **everything)["choices"][0]["token_ids"] for _ in range(2)]
    assert len(answers[0]) == LONG
    assert all(one == other for one, other in pairwise(answers))
