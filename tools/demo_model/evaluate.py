"""Score the demo model's exact greedy answers with plain PyTorch: `python -m tools.demo_model.evaluate [directory]`.

The whole question and the expected answer run in one forward pass: greedy decoding would give exactly this answer
if and only if each of its tokens is the most likely one after those before it.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from tokenizers import Tokenizer

from tools.demo_model.checkpoint import load
from tools.demo_model.corpus_grammar import IM_END, IM_START, Message, render
from tools.demo_model.network import Network
from tools.demo_model.questions import PLAIN, QUESTIONS, TOOL_QUESTIONS
from trio_llm.demo import demo_model_path


@torch.inference_mode()
def answers_exactly(network: Network, tokenizer: Tokenizer, prompt: str, answer: str) -> bool:
    """Say whether greedy decoding after `prompt` gives `answer`."""
    prompt_ids, answer_ids = tokenizer.encode(prompt).ids, tokenizer.encode(answer).ids
    logits = network(torch.tensor([prompt_ids + answer_ids]))[0, len(prompt_ids) - 1 : -1]
    return logits.argmax(-1).tolist() == answer_ids


def prompt_of(messages: list[Message], tools: tuple[Message, ...] = ()) -> str:
    """Write the chat up to where the assistant answers."""
    return render(messages, tools) + f"{IM_START}assistant\n"


def evaluate(directory: Path) -> Mapping[str, str]:
    """Return topic -> "right/asked" for the checkpoint in `directory`."""
    network, tokenizer = load(directory)
    scores: dict[str, str] = {}
    for topic, questions in QUESTIONS.items():
        right = [answers_exactly(network, tokenizer, prompt_of(asked), answer + IM_END) for asked, answer in questions]
        scores[topic] = f"{sum(right)}/{len(right)}"
    right = [
        answers_exactly(network, tokenizer, prompt_of(asked, tools), answer + IM_END)
        for asked, tools, answer in TOOL_QUESTIONS
    ]
    scores["tool calls"] = f"{sum(right)}/{len(right)}"
    right = [answers_exactly(network, tokenizer, text, continuation) for text, continuation in PLAIN.items()]
    scores["plain completion"] = f"{sum(right)}/{len(right)}"
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, nargs="?", default=demo_model_path())
    for topic, score in evaluate(parser.parse_args().directory).items():
        print(f"| {topic} | {score} |")


if __name__ == "__main__":
    main()
