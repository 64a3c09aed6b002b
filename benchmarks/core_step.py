"""Microseconds that a decode step costs in the scheduler and the block manager: `python benchmarks/core_step.py`.

Cold means that 32 MB are read between plan and commit, as a step of a model does: nothing of the sequences is left in
the caches of the core. Warm is the core's own work.
"""

from __future__ import annotations

import statistics
import time
from itertools import pairwise

import numpy as np

from trio_llm.core.block_manager import BlockManager
from trio_llm.core.scheduler import Scheduler
from trio_llm.messages import StepResult
from trio_llm.model_info import KVGroup
from trio_llm.params import SamplingParams, Submission

PROMPT_TOKENS, OUTPUT_TOKENS, BUDGET = 100, 300, 2048
FULL = (KVGroup((0,), 16),)
HYBRID = (KVGroup((0,), 16), KVGroup((1,), 16, 64))
# Ones: zeros that nobody has written are one page of memory, read again and again.
SWEPT = np.ones(4 << 20)


def measure(num_rows: int, groups: tuple[KVGroup, ...], *, cold: bool) -> list[float]:
    """Return the medians of ask, reserve, plan, commit and their sum over the steps in which every row decodes."""
    blocks = BlockManager(num_blocks=32768, groups=groups, secret=b"benchmark", max_step_tokens=BUDGET)
    scheduler = Scheduler(
        max_num_batched_tokens=BUDGET, max_batch_size=num_rows, max_model_len=4096, eos_token_ids=(0,)
    )
    for row in range(num_rows):
        # Different lengths, so that rows do not all need a block in the same step.
        prompt = range(1000 * row, 1000 * row + PROMPT_TOKENS + row % 16)
        scheduler.submit(row, Submission(prompt, SamplingParams(max_tokens=OUTPUT_TOKENS)))
    steps: list[list[float]] = []
    while True:
        times = [time.perf_counter()]
        ask = scheduler.ask()
        if ask is None:
            break
        times.append(time.perf_counter())
        grant = blocks.reserve(ask)
        times.append(time.perf_counter())
        plan = scheduler.plan(grant)
        times.append(time.perf_counter())
        if plan is None:
            continue
        result = StepResult(plan.step, tuple([(5,) if samples else () for samples in plan.samples]))
        if cold:
            SWEPT.sum()
        begin = time.perf_counter()
        scheduler.commit(result)
        spent = [later - earlier for earlier, later in pairwise(times)]
        spent.append(time.perf_counter() - begin)
        if plan.counts == (1,) * num_rows:
            steps.append([*spent, sum(spent)])
    return [statistics.median(column) * 1e6 for column in zip(*steps, strict=True)]


if __name__ == "__main__":
    print(f"{'rows':>5} {'groups':>6} {'caches':>6} {'ask':>6} {'reserve':>7} {'plan':>6} {'commit':>6} {'all, us':>8}")
    for num_rows in (1, 32, 256):
        for groups in (FULL, HYBRID):
            for cold in (False, True):
                columns = zip(measure(num_rows, groups, cold=cold), (6, 7, 6, 6, 8), strict=True)
                spent = " ".join([f"{us:{width}.0f}" for us, width in columns])
                print(f"{num_rows:5} {len(groups):6} {'cold' if cold else 'warm':>6} {spent}")
