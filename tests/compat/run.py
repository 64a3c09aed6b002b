r"""Run the client libraries of other people against `trio-llm serve` and print the table of them in docs/serving.md.

    python -m venv compat && compat/bin/pip install openai anthropic litellm langchain-openai 'lm-eval[api]' mcp \
        instructor 'pydantic-ai-slim[openai]' llama-index-llms-openai-like
    python tests/compat/run.py compat/bin/python

Clients in JavaScript have a script of their own, `checks.mjs`.

This script needs the project with its test extra; the clients live in an environment of their own, whose Python is the
argument. Nothing leaves this machine. The scores that lm-eval must find are computed here, with transformers.
"""

from __future__ import annotations

import datetime as dt
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
import trio
from checks import CHECKS

from trio_llm.cli.bench.child import serving
from trio_llm.demo import demo_model_path

TIMEOUT_S = 240
PAIRS = [
    ("The capital of Japan is", " Tokyo."),
    ("The capital of Japan is", " Paris."),
    ("Once upon a time there was a", " little fox who lived near the river."),
    ("{", '"city": "Rome"}'),
    ("Repeat:", " one two three four five"),
]


def scores() -> list[dict[str, Any]]:
    """Return the log-probability of each continuation, and whether it is what greedy decoding says."""
    path = demo_model_path()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"))
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    found: list[dict[str, Any]] = []
    for context, continuation in PAIRS:
        # lm-eval's own way to cut, also where the tokens of both texts together would cross the border.
        before = tokenizer.encode(context)
        start = len(before)
        whole = before + tokenizer.encode(context + continuation)[start:]
        with torch.inference_mode():
            logprobs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        rows = logprobs[start - 1 : len(whole) - 1]
        picked = torch.tensor(whole[start:])
        found.append(
            {
                "context": context,
                "continuation": continuation,
                "logprob": rows.gather(1, picked[:, None]).sum().item(),
                "greedy": bool((rows.argmax(-1) == picked).all()),
            }
        )
    return found


def main() -> None:
    """Run every check, print a line for each, and fail if one of them did."""
    python, *only = sys.argv[1:]
    script = Path(__file__).with_name("checks.py")
    failed = False
    with tempfile.NamedTemporaryFile("w", suffix=".json") as reference:
        json.dump(scores(), reference)
        reference.flush()
        with serving(["--dtype", "float32", "--served-model-name", "demo"]) as server:
            trio.run(server.listening)
            sys.stdout.write(f"{dt.datetime.now(dt.UTC).date()}\n\n| client | version | result |\n|---|---|---|\n")
            for name, check in CHECKS.items():
                if only and name not in only:
                    continue
                command = [python, str(script), name, server.api.base_url, "demo", reference.name]
                done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
                failed |= done.returncode != 0
                version = done.stdout.rpartition("version ")[2].strip() if done.returncode == 0 else "?"
                result = check.__doc__ if done.returncode == 0 else "FAILED: " + done.stderr.strip()[-300:]
                sys.stdout.write(f"| {name} | {version} | {result} |\n")
                sys.stdout.flush()
    sys.exit(failed)


if __name__ == "__main__":
    main()
