"""The table of memory beside what a process takes: the peaks of loading and of the largest steps, for each format.

Each case runs in a process of its own, which this one watches: anonymous memory, so that the files' pages, which the
system may drop, do not count. The start of Python, torch and the kernels is taken off. Then come the largest steps:
decodes of more and more rows, up to as many as the settings allow, prompts of as many tokens as a step holds, and each
way to sample.

    python benchmarks/memory_table.py CHECKPOINT FILE.gguf
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from models import machine

from trio_llm.config import EngineConfig

MIB = 2**20
POLL_S = 0.005
WISHES: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"seed": 1},
    {"seed": 1, "top_p": 0.9, "top_k": 100, "logprobs": 5},
    {"seed": 1, "top_p": 0.999, "frequency_penalty": 0.5, "min_tokens": 4},
)


def anonymous_bytes(pid: int) -> int:
    """Return a process's anonymous memory."""
    with Path(f"/proc/{pid}/status").open(encoding="ascii") as lines:
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def work(settings: dict[str, Any]) -> None:
    """Load, then run the largest steps; say what begins, and wait until it is read."""
    import torch

    from trio_llm.model import load
    from trio_llm.params import SamplingParams
    from trio_llm.verify.drive import run

    def say(phase: str, **more: Any) -> None:
        print(json.dumps({"phase": phase, **more}), flush=True)
        sys.stdin.readline()

    logging.disable()
    load.find_kernels("auto", load.Cpu(), lambda _: None)
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))
    say("load")
    runner = load.load_runner(EngineConfig(**settings))
    budget = runner.budget
    parts = {
        "weights": budget.weight_bytes, "kv": budget.kv_bytes, "workspace": budget.workspace_bytes,
        "loading": budget.loading_bytes, "total": budget.total_bytes,
    }  # fmt: skip
    say("fill", **parts)
    for layer in runner._kv.layers:
        layer.k.fill_(0)
        layer.v.fill_(0)
    say("steps")
    vocab = runner.info.vocab_size

    def serve(rows: int, tokens: int, **wish: Any) -> None:
        wanted = SamplingParams(max_tokens=2, ignore_eos=True, **wish)
        prompts = [[(7 * row + 3 * token) % (vocab - 10) + 5 for token in range(tokens)] for row in range(rows)]
        run(runner, [(prompt, wanted) for prompt in prompts], caching=False, batch_size=256)

    for rows in (1, 3, 10, 24, 64, 120, 200, 256):
        serve(rows, 2, temperature=0)
    for wish in WISHES:
        serve(256, 8, **wish)
    say("end")


def watch(settings: dict[str, Any]) -> dict[str, int]:
    """Run a case in a process of its own; return its parts of the table, and the peaks and ends of its phases."""
    child = subprocess.Popen(
        [sys.executable, __file__, "--work", json.dumps(settings)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdin is not None
    assert child.stdout is not None
    found: dict[str, int] = {}
    peak = 0
    ended = threading.Event()

    def poll() -> None:
        nonlocal peak
        while not ended.is_set():
            try:
                peak = max(peak, anonymous_bytes(child.pid))
            except (OSError, ValueError):
                return
            time.sleep(POLL_S)

    thread = threading.Thread(target=poll)
    thread.start()
    before = None
    for line in child.stdout:
        told = json.loads(line)
        phase = told.pop("phase")
        found.update(told)
        if before is not None:
            found[f"peak {before}"], found[f"after {before}"] = peak, anonymous_bytes(child.pid)
        else:
            found["start"] = anonymous_bytes(child.pid)
        peak, before = 0, phase
        child.stdin.write("\n")
        child.stdin.flush()
    ended.set()
    thread.join()
    child.wait()
    return found


def main(checkpoint: str, file: str) -> None:
    """Print a row per format."""
    cases: dict[str, dict[str, Any]] = {
        "bfloat16": {"model": checkpoint},
        "float32": {"model": checkpoint, "dtype": "float32"},
        "INT8": {"model": checkpoint, "quantization": "int8"},
        "GGUF as stored": {"model": file},
        "GGUF, INT8": {"model": file, "quantization": "int8"},
    }
    print(f"{machine()}; MiB\n")
    print("| weights | weights | loading | KV cache | workspace | total | peak of loading | after it | peak of steps |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, settings in cases.items():
        found = watch({"num_kv_blocks": 256, "max_num_batched_tokens": 2048, "device": "cpu", **settings})
        start = found["start"]
        columns = [found[part] for part in ("weights", "loading", "kv", "workspace", "total")]
        columns += [found[part] - start for part in ("peak load", "after load", "peak steps")]
        print(f"| {name} | {' | '.join(f'{column / MIB:.0f}' for column in columns)} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "--work":
        work(json.loads(sys.argv[2]))
    else:
        main(*sys.argv[1:])
