"""What splitting a model costs on CPUs: time per step, in collectives and apart from them, and bytes, per rank.

    python benchmarks/tensor_parallel.py

Random weights in the proportions of Qwen2.5-0.5B, fewer layers. Ranks share the threads that one process has. Bytes are
those that a rank hands to collectives; a ring of two sends as many.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
from models import loaded, machine, spread

from trio_llm.messages import Admission, StepPlan
from trio_llm.model.parallel.group import Group
from trio_llm.model.runner import Runner
from trio_llm.params import SamplingParams

SHAPE: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 8,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 32_000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}
PROMPT_TOKENS, DECODES, BLOCK_TOKENS = 256, 20, 16


@attrs.define
class Moved:
    """What rank 0 handed to collectives, and how long it waited for them."""

    calls: int = 0
    nbytes: int = 0
    seconds: float = 0.0


@contextmanager
def counting() -> Iterator[Moved]:
    """Count this process's collectives."""
    moved, wait = Moved(), Group._wait

    def counted(self: Group, collective: str, *args: Any) -> None:
        began_s = time.perf_counter()
        wait(self, collective, *args)
        moved.seconds += time.perf_counter() - began_s
        moved.calls += 1
        moved.nbytes += (args[1] if collective == "gather" else args[0])[0].nbytes

    Group._wait = counted
    try:
        yield moved
    finally:
        Group._wait = wait


def plan(step: int, rows: int, start: int, count: int) -> StepPlan:
    """Return a step of equal rows, each with blocks of its own; the first one admits them."""
    admitted: tuple[Admission, ...] = ()
    blocks: tuple[Any, ...] = ((),) * rows
    if start == 0:
        params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
        admitted = tuple(Admission(row, (5,) * count, count, params) for row in range(rows))
        each = -(-(PROMPT_TOKENS + DECODES + 2) // BLOCK_TOKENS)
        blocks = tuple(((0, tuple(range(1 + row * each, 1 + (row + 1) * each))),) for row in range(rows))
    tokens = (5,) * (rows * count)
    return StepPlan(
        step, (), admitted, tuple(range(rows)), (start,) * rows, (count,) * rows, tokens, (True,) * rows, blocks
    )


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process."""
    words = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / 100


def measure(runner: Runner, rows: int) -> None:
    """Print one line for prompts and one for decodes."""
    with counting() as moved:
        first = runner.step(plan(0, rows, 0, PROMPT_TOKENS))
    line("prompts", rows, [first.seconds], moved, 1)
    others = [] if runner.ranks is None else runner.ranks.pids
    runner.step(plan(1, rows, PROMPT_TOKENS, 1))
    before = [cpu_seconds(pid) for pid in others]
    with counting() as moved:
        times = [runner.step(plan(2 + i, rows, PROMPT_TOKENS + 1 + i, 1)).seconds for i in range(DECODES)]
    line("decodes", rows, times, moved, DECODES)
    for pid, began_s in zip(others, before, strict=True):
        print(f"    rank 1: {1000 * (cpu_seconds(pid) - began_s) / DECODES:.1f} ms of CPU time a step")


def line(what: str, rows: int, seconds: list[float], moved: Moved, steps: int) -> None:
    """Print the time of steps and what one of them moved."""
    print(
        f"  {what} of {rows} rows: {spread([1000 * each for each in seconds])} ms a step; collectives "
        f"{moved.calls // steps}, {moved.nbytes // steps:,} bytes, {1000 * moved.seconds / steps:.2f} ms"
    )


def main() -> None:
    """Measure one rank beside two."""
    print(machine())
    for size in (1, 2):
        print(f"{size} rank{'s' * (size > 1)}")
        for rows in (1, 8):
            options = {"max_batch_size": 8, "num_kv_blocks": 256, "cpu_threads": 2, "tensor_parallel_size": size}
            with loaded(SHAPE, **options) as runner:
                measure(runner, rows)


if __name__ == "__main__":
    main()
