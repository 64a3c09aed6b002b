"""The sampler, one row at a time, in float64 and as plainly as numpy allows: the judge of the fast one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from trio_llm.params import SamplingParams

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


def exponentials(seed: int, position: int, vocab_size: int) -> np.ndarray:
    """The noise of every token, in numpy's integers; a test holds it to `exponential`."""
    golden = 0x9E3779B97F4A7C15
    key = mix64((mix64(((seed % 2**64) + golden) & MASK64) + position * golden) & MASK64)
    offset, factor = np.uint64(key & 0xFFFFFFFF), np.uint64((key >> 32) | 1)
    low, z = np.uint64(0xFFFFFFFF), np.arange(1, vocab_size + 1, dtype=np.uint64) * np.uint64(golden)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    h = (z ^ (z >> np.uint64(31))) >> np.uint64(32)
    h = ((h ^ offset) * factor) & low
    h = ((h ^ (h >> np.uint64(15))) * np.uint64(0x2C1B3C6D)) & low
    h = ((h ^ (h >> np.uint64(12))) * np.uint64(0x297A2D39)) & low
    h = (h ^ (h >> np.uint64(15))) & np.uint64(0x7FFFFFFF)
    return -np.log1p(-np.minimum((h + 0.5) * 2.0**-31, 1 - 2.0**-24))


def edited(
    logits: np.ndarray, params: SamplingParams, prompt: Sequence[int], output: Sequence[int], eos: Sequence[int]
) -> np.ndarray:
    """Apply masks, bias and penalties to one row."""
    x = logits.astype(np.float64).copy()
    if params.allowed_token_ids is not None:
        x[np.setdiff1d(np.arange(len(x)), params.allowed_token_ids)] = -math.inf
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
        order = np.argsort(-scores, kind="stable")
        ahead = np.concatenate([[0.0], mass[order].cumsum()[:-1]])  # of each token, the mass of those before it
        inside = order[(ahead < (params.top_p + slack) * mass.sum()) & keep[order]]
        last = scores[inside].min(initial=math.inf)
        keep &= scores >= last - slack
    return keep


def probabilities(x: np.ndarray, params: SamplingParams) -> np.ndarray:
    """The distribution a token is drawn from."""
    weights = np.where(kept(x, params), np.exp((x - x.max()) / params.temperature), 0)
    return weights / weights.sum()


def lots(x: np.ndarray, params: SamplingParams, seed: int, position: int) -> np.ndarray:
    """Each token's lot before filtering; the largest among those kept wins."""
    return (x - x.max()) / params.temperature - np.log(exponentials(seed, position, len(x)))
