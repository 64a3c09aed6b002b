"""What a record costs: the same requests on two engines, one of which records, in turns.

    python benchmarks/recording.py
    python benchmarks/recording.py --model /models/Qwen2.5-0.5B --streams 64 --rounds 20

Wall times are ratios of one round; the first round warms up and is left out. What the recorder does is also measured
alone, in CPU time as the kernel counts it, relative to the wall time of the steps: its thread, and the calls that the
event loop makes, each timed in place.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles

from trio_llm import LLM, SamplingParams
from trio_llm.engine.recorder import Recorder

PROMPTS = ("Once upon a time", "The little owl", "A small fox lived", "There was a brave cat")


def thread_s() -> float:
    """Return the CPU seconds of the recorder's thread."""
    (thread,) = [one for one in threading.enumerate() if one.name == "trio-llm-recorder"]
    return int(Path(f"/proc/self/task/{thread.native_id}/schedstat").read_text().split()[0]) / 1e9


def time_calls() -> list[float]:
    """Time the event loop's calls of the recorder from now on; return a list that gets the CPU seconds of each."""
    seconds: list[float] = []

    def timed(call: Callable[..., None]) -> Callable[..., None]:
        def timed_call(*args: object) -> None:
            start_s = time.thread_time()
            call(*args)
            seconds.append(time.thread_time() - start_s)

        return timed_call

    for name in ("arrived", "left", "planned", "committed"):
        setattr(Recorder, name, timed(getattr(Recorder, name)))
    return seconds


def run(llm: LLM, streams: int, tokens: int) -> float:
    """Return the seconds of all requests."""
    params = SamplingParams(max_tokens=tokens, temperature=0.8, seed=1, ignore_eos=True)
    prompts = [f"{PROMPTS[at % len(PROMPTS)]} {at}" for at in range(streams)]
    start_s = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - start_s


def main() -> None:
    """Run the rounds and print ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: the demo model")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=12)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        with LLM(given.model) as plain, LLM(given.model, record=directory) as recording:
            ratios: list[float] = []
            shares: list[float] = []
            call_shares: list[float] = []
            step_s = 0.0
            seconds = time_calls()
            for number in range(given.rounds + 1):
                engines = (plain, recording) if number % 2 else (recording, plain)
                before_s = thread_s()
                seconds.clear()
                spent = {engine: run(engine, given.streams, given.tokens) for engine in engines}
                time.sleep(0.4)  # The thread gathers before it writes.
                ratios.append(spent[recording] / spent[plain])
                shares.append((thread_s() - before_s) / spent[recording])
                call_shares.append(sum(seconds) / spent[recording])
                step_s = spent[recording] / given.tokens
        size = sum(path.stat().st_size for path in Path(directory).iterdir())
    steps = (given.rounds + 1) * given.tokens
    print(f"{given.streams} streams, {given.rounds} rounds, {1000 * step_s:.2f} ms and {size / steps:.0f} bytes a step")
    for name, values in (
        ("time with a record, relative", ratios[1:]),
        ("the recorder's thread, share", shares[1:]),
        ("its calls on the event loop, share", call_shares[1:]),
    ):
        low, _, high = quantiles(values, n=4)
        print(f"{name}: median {median(values):.4f}, quartiles {low:.4f} to {high:.4f}")


if __name__ == "__main__":
    main()
