"""Record what llama.cpp makes of SmolLM2's GGUF file, as the reference of test_llama_cpp.py.

Run it from the repository's folder with a Python that has llama-cpp-python (0.3.36 wrote the committed file):

    python -m tests.real.llama_cpp SmolLM2-135M-Instruct.Q4_1.gguf

It writes llama_cpp.json beside this module: ids of the corpus, the mean negative log-likelihood of a text, and greedy
answers. Nothing else of this project is imported.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from tests.real.corpus import PROSE, QUESTIONS, TEXTS

RECORD = Path(__file__).with_name("llama_cpp.json")
NUM_TOKENS = 60


def chat(question: str) -> str:
    """Return a question as SmolLM2's template writes it, without its system prompt."""
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def main(file: str) -> None:
    """Ask llama.cpp and write the record."""
    import llama_cpp

    model = llama_cpp.Llama(file, n_ctx=2048, logits_all=True, seed=0, verbose=False)

    def tokenize(text: str) -> list[int]:
        return model.tokenize(text.encode(), add_bos=False, special=True)

    ids = tokenize(PROSE)
    model.eval(ids)
    logits = np.array(model.scores[: len(ids) - 1], np.float64)
    logits -= logits.max(-1, keepdims=True)
    likelihoods = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    loss = -likelihoods[np.arange(len(ids) - 1), ids[1:]].mean()
    answers = []
    for question in QUESTIONS:
        model.reset()
        answer: list[int] = []
        for token in model.generate(tokenize(chat(question)), temp=0, top_k=1, repeat_penalty=1.0):
            answer.append(int(token))
            if len(answer) == NUM_TOKENS or token == model.token_eos():
                break
        answers.append(answer)
    record = {
        "llama-cpp-python": llama_cpp.__version__,
        "ids": [tokenize(text) for text in TEXTS],
        "loss": round(float(loss), 6),
        "answers": answers,
    }
    RECORD.write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
