"""Decode speed and memory of INT8 weights beside bfloat16, on one machine, in alternation.

A Qwen3 of random weights, as wide as the 0.6B one and with 8 of its 28 layers. Each round runs every batch size in both
types, one after the other; the ratio is taken per round. Contexts are short: it is the weights that are compared.

    python benchmarks/int8_weights.py --rounds 7
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import ExitStack

from models import loaded, machine, resident_bytes, spread

from trio_llm.messages import Admission, StepPlan
from trio_llm.model.runner import Runner
from trio_llm.params import SamplingParams

BATCH_SIZES = (1, 8, 32)
PROMPT_TOKENS, STEPS, BLOCK = 8, 8, 16
SHAPE = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 32768,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
PARAMS = SamplingParams(temperature=0, max_tokens=STEPS, ignore_eos=True)


def decode_s(runner: Runner, batch_size: int) -> float:
    """Prefill a batch and return the median seconds of its decode steps, sampling included."""
    rows = tuple(range(batch_size))
    prompt = tuple(range(100, 100 + PROMPT_TOKENS))
    per_row = -(-(PROMPT_TOKENS + STEPS) // BLOCK)
    blocks = tuple(((0, tuple(range(1 + row * per_row, 1 + (row + 1) * per_row))),) for row in rows)
    admitted = tuple(Admission(row, prompt, PROMPT_TOKENS, PARAMS) for row in rows)
    starts, counts, samples = (0,) * batch_size, (PROMPT_TOKENS,) * batch_size, (True,) * batch_size
    plan = StepPlan(
        0, tuple(range(max(BATCH_SIZES))), admitted, rows, starts, counts, prompt * batch_size, samples, blocks
    )
    tokens = [row[0] for row in runner.step(plan).token_ids]
    seconds: list[float] = []
    for step in range(1, STEPS):
        starts = (PROMPT_TOKENS + step - 1,) * batch_size
        plan = StepPlan(step, (), (), rows, starts, (1,) * batch_size, tuple(tokens), samples, ((),) * batch_size)
        began = time.perf_counter()
        tokens = [row[0] for row in runner.step(plan).token_ids]
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def main() -> None:
    """Load both, run the rounds, print medians with their ranges."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    print(machine())
    with ExitStack() as stack:
        runners: dict[str, Runner] = {}
        print("\n| weights | bytes of the tensors | growth of the process |\n|---|---|---|")
        for kind, quantization in (("bfloat16", None), ("INT8", "int8")):
            before = resident_bytes()
            # One block a sequence: the pool is to be small beside the weights.
            pool = {"num_kv_blocks": 1 + max(BATCH_SIZES), "block_size": BLOCK, "max_batch_size": max(BATCH_SIZES)}
            runner = loaded(SHAPE, dtype="bfloat16", quantization=quantization, **pool)
            runners[kind] = stack.enter_context(runner)
            growth = resident_bytes() - before
            print(f"| {kind} | {runners[kind].budget.weight_bytes:,} | {growth:,} |")
        print("\n| sequences | bfloat16, ms a step | INT8, ms a step | times as fast |\n|---|---|---|---|")
        for batch_size in BATCH_SIZES:
            times = [[decode_s(runner, batch_size) for runner in runners.values()] for _ in range(rounds + 1)][1:]
            dense_ms, int8_ms = ([1000 * seconds for seconds in column] for column in zip(*times, strict=True))
            ratios = [dense / int8 for dense, int8 in zip(dense_ms, int8_ms, strict=True)]
            print(f"| {batch_size} | {spread(dense_ms, 1)} | {spread(int8_ms, 1)} | {spread(ratios)} |")


if __name__ == "__main__":
    main()
