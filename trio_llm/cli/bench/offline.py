"""`trio-llm bench latency` and `bench throughput`: one batch, and many requests, through `LLM`."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from typing import Any

from trio_llm.cli.bench.report import Figure, Row
from trio_llm.llm import LLM
from trio_llm.params import SamplingParams


def latency(
    settings: Mapping[str, Any], *, input_tokens: int, output_tokens: int, batch_size: int, repetitions: int
) -> list[Row]:
    """Measure how long one batch takes from its arrival to its last token."""
    shape = {"input": input_tokens, "output": output_tokens, "batch": batch_size}
    with LLM(**settings) as llm:
        seconds = _repeat(llm, batch_size, input_tokens, output_tokens, repetitions)
    per_token = tuple(1e3 * one / output_tokens for one in seconds)
    return [(shape, [Figure("latency", "s", seconds, 3), Figure("per output token", "ms", per_token, 2)])]


def throughput(
    settings: Mapping[str, Any], *, input_tokens: int, output_tokens: int, num_requests: int, repetitions: int
) -> list[Row]:
    """Measure how many tokens a second come out when all requests are there from the start."""
    shape = {"input": input_tokens, "output": output_tokens, "requests": num_requests}
    with LLM(**settings) as llm:
        seconds = _repeat(llm, num_requests, input_tokens, output_tokens, repetitions)
    each = {"requests": 1, "output tokens": output_tokens, "all tokens": input_tokens + output_tokens}
    figures = [
        Figure(name, "per s", tuple(num_requests * count / one for one in seconds), 1) for name, count in each.items()
    ]
    return [(shape, figures)]


def _repeat(llm: LLM, num_requests: int, input_tokens: int, output_tokens: int, repetitions: int) -> tuple[float, ...]:
    """Return the seconds of each repetition, after one that warms up; no prompt is asked twice."""
    dice = random.Random(0)
    params = SamplingParams(temperature=0, max_tokens=output_tokens, ignore_eos=True)
    seconds: list[float] = []
    for _ in range(repetitions + 1):
        prompts = [
            {"prompt_token_ids": [dice.randrange(llm.info.vocab_size) for _ in range(input_tokens)]}
            for _ in range(num_requests)
        ]
        started_s = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        seconds.append(time.perf_counter() - started_s)
    return tuple(seconds[1:])
