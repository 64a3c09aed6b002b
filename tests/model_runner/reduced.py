"""Whole models in bfloat16 through the real scheduler, block manager and runner, held to transformers in float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tests.model_runner.conftest import Golden, make_prompts
from tests.model_runner.drive import least_blocks, run
from trio_llm.model.runner import Runner
from trio_llm.params import SamplingParams

# What bfloat16 may move a token's log-probability by, in nats, on the mean over all tokens of prompts and outputs. The
# torch reference on a CPU measured 0.01 to 0.025, with int8 keys and values 0.014 to 0.035; about twice that.
MOST = 0.08
WAYS: dict[str, dict[str, Any]] = {
    "plain": {"caching": False},
    "prefix cache": {},
    "chunks": {"chunk": 7},
    "small batches": {"batch_size": 5, "chunk": 16},
    "preemption": {"chunk": 7, "caching": False},
}
SCORED = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=0, prompt_logprobs=0)


def mean_error(runner: Runner, golden: Golden, way: str) -> float:
    """Serve sixteen prompts; return the mean difference of all tokens' log-probabilities from the oracle's."""
    ways = dict(WAYS[way])
    if way == "preemption":
        ways["num_blocks"] = least_blocks(runner, 61, chunk=7) + 4
    # Prompts that are scored do not take part in the prefix cache: half of them, so that some decode out of it.
    unscored = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=0)
    requests = [(prompt, (SCORED, unscored)[i % 2]) for i, prompt in enumerate(make_prompts())]
    outcome = run(runner, requests, **ways)
    assert (outcome.num_preempted > 0) == (way == "preemption")
    differences: list[float] = []
    for (prompt, _), answer in zip(requests, outcome.answers, strict=True):
        tokens = prompt + answer.token_ids
        with torch.inference_mode():
            exact = golden.oracle(input_ids=torch.tensor([tokens])).logits[0].float().log_softmax(-1)
        entries = [*(answer.prompt_logprobs or [None] * len(prompt)), *answer.logprobs]
        assert [entry.token_id for entry in answer.logprobs] == answer.token_ids
        differences += [abs(e.logprob - float(exact[i - 1, e.token_id])) for i, e in enumerate(entries) if e]
    return float(np.mean(differences))
