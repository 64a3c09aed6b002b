"""The sampler, one row at a time, in float64 and as naively as it can be written: the judge of the fast one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from trio_llm.messages import SamplingParams

MASK64 = 2**64 - 1


def mix64(z: int) -> int:
    """splitmix64's finaliser, in Python integers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
    return z ^ (z >> 31)


def exponential(seed: int, position: int, token_id: int) -> float:
    """The noise of one token, in Python integers."""
    golden = 0x9E3779B97F4A7C15
    key = mix64((mix64(((seed % 2**64) + golden) & MASK64) + position * golden) & MASK64)
    offset, factor = key & 0xFFFFFFFF, (key >> 32) | 1
    h = mix64(((token_id + 1) * golden) & MASK64) >> 32
    h = ((h ^ offset) * factor) & 0xFFFFFFFF
    h = ((h ^ (h >> 15)) * 0x2C1B3C6D) & 0xFFFFFFFF
    h = ((h ^ (h >> 12)) * 0x297A2D39) & 0xFFFFFFFF
    h = (h ^ (h >> 15)) & 0x7FFFFFFF
    return -math.log1p(-min((h + 0.5) * 2.0**-31, 1 - 2.0**-24))


def edited(
    logits: np.ndarray, params: SamplingParams, prompt: Sequence[int], output: Sequence[int], eos: Sequence[int]
) -> np.ndarray:
    """Apply masks, bias and penalties to one row."""
    x = logits.astype(np.float64).copy()
    for token in range(len(x)):
        if params.allowed_token_ids is not None and token not in params.allowed_token_ids:
            x[token] = -math.inf
    for word in params.bad_words_token_ids:
        head = word[:-1]
        if not head or tuple(output[-len(head) :]) == head:
            x[word[-1]] = -math.inf
    if len(output) < params.min_tokens:
        for token in (*eos, *params.stop_token_ids):
            x[token] = -math.inf
    for token, bias in params.logit_bias.items():
        x[token] += bias
    counts = Counter(output)
    for token in {*prompt, *output}:
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    for token, count in counts.items():
        x[token] -= params.frequency_penalty * count + params.presence_penalty
    return x


def kept(x: np.ndarray, params: SamplingParams, slack: float = 0.0) -> np.ndarray:
    """Which tokens the filters leave; a positive slack leaves those on the border too, a negative one does not."""
    scores = (x - x.max()) / params.temperature
    keep = scores > -math.inf
    if params.min_p > 0:
        keep &= scores >= math.log(params.min_p) - slack
    if 0 < params.top_k < len(x):
        keep &= scores >= np.sort(scores)[::-1][params.top_k - 1] - slack
    if params.top_p < 1:
        mass = np.where(keep, np.exp(scores), 0)
        goal, reached, last = (params.top_p + slack) * mass.sum(), 0.0, math.inf
        for token in np.argsort(-scores, kind="stable"):
            if reached >= goal or not keep[token]:
                break
            last, reached = scores[token], reached + mass[token]
        keep &= scores >= last - slack
    return keep


def probabilities(x: np.ndarray, params: SamplingParams) -> np.ndarray:
    """The distribution a token is drawn from."""
    weights = np.where(kept(x, params), np.exp((x - x.max()) / params.temperature), 0)
    return weights / weights.sum()


def lots(x: np.ndarray, params: SamplingParams, seed: int, position: int) -> np.ndarray:
    """Each token's lot before filtering; the largest among those kept wins."""
    noise = np.array([exponential(seed, position, token) for token in range(len(x))])
    return (x - x.max()) / params.temperature - np.log(noise)
