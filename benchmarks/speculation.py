"""What guessing tokens is worth: the demo model with nothing, with look-ups and with its draft model, side by side.

    python benchmarks/speculation.py
    python benchmarks/speculation.py --model /models/Qwen2.5-7B --spec-model /models/Qwen2.5-0.5B --rounds 5

The real scheduler, block manager and runner, stepped by hand, float32. In every round each way answers the same
requests, the ways taking turns at being first; ratios are of one round. Exit code 1 if a way changes an answer.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from statistics import median

import attrs

from trio_llm.config import EngineConfig
from trio_llm.core.block_manager import BlockManager
from trio_llm.core.prompt_lookup import LookupSizes
from trio_llm.core.scheduler import Scheduler
from trio_llm.core.speculation import Speculation
from trio_llm.messages import Tokens
from trio_llm.model.checkpoint.hub import resolve_model
from trio_llm.model.load import load_runner
from trio_llm.model.runner import Runner
from trio_llm.params import SamplingParams, Submission
from trio_llm.tokenizer import Tokenizer

STORIES = ["Once upon a time", "The little owl", "A small fox lived", "There was a brave cat"] * 2
LISTS = [
    f"{name} has a red kite. {name} has a blue kite. {name} has a red" for name in ("Tom", "Mia", "Ben", "Ada")
] * 2
TEXTS = {"stories": STORIES, "lists": LISTS}


@attrs.frozen
class Way:
    """One way to answer: how it guesses, and the runner that knows how."""

    name: str
    speculation: Speculation | None
    runner: Runner


@attrs.frozen
class Run:
    """What one way made of one workload."""

    answers: list[list[int]]
    seconds: float
    cpu_seconds: float
    num_row_steps: int
    num_drafted: int
    num_accepted: int

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.answers))

    @property
    def tokens_per_row(self) -> float:
        """Tokens that one sequence gets out of one step of the model; the first ones come of the prompts."""
        return (self.num_tokens - len(self.answers)) / self.num_row_steps


def answer(way: Way, prompts: Sequence[Sequence[int]], params: SamplingParams) -> Run:
    """Answer all prompts in one batch."""
    info = way.runner.info
    blocks = BlockManager(num_blocks=info.num_kv_blocks, groups=info.kv_groups, secret=b"", max_step_tokens=2048)
    scheduler = Scheduler(
        max_num_batched_tokens=2048,
        max_batch_size=len(prompts),
        max_model_len=min(info.max_model_len, blocks.max_tokens()),
        eos_token_ids=info.eos_token_ids,
        speculation=way.speculation,
    )
    for request_id, prompt in enumerate(prompts):
        scheduler.submit(request_id, Submission(prompt, params))
    answers: list[list[int]] = [[] for _ in prompts]
    rows = drafted = accepted = 0
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    while (ask := scheduler.ask()) is not None:
        plan = scheduler.plan(blocks.reserve(ask))
        if plan is None:
            continue
        commit = scheduler.commit(way.runner.step(plan))
        rows += len(plan.request_ids) if not plan.admitted else 0
        drafted += sum(commit.stats.drafted)
        accepted += sum(commit.stats.accepted)
        for request_id, event in commit.events:
            if isinstance(event, Tokens):
                answers[request_id] += event.token_ids
    seconds, cpu_seconds = time.perf_counter() - began_s, time.process_time() - began_cpu_s
    return Run(answers, seconds, cpu_seconds, rows, drafted, accepted)


def make_ways(options: argparse.Namespace) -> list[Way]:
    """Load the model once for each way that needs a runner of its own."""
    config = EngineConfig(model=options.model, dtype="float32", num_kv_blocks=options.kv_blocks, max_batch_size=8)
    plain = load_runner(config)
    ways = [Way("none", None, plain)]
    ways += [Way(f"ngram, {most}", Speculation(most, LookupSizes(2, 4)), plain) for most in options.drafts]
    for most in options.drafts:
        settings = {"spec_method": "draft_model", "spec_model": options.spec_model, "max_draft_tokens": most}
        runner = load_runner(attrs.evolve(config, **settings))
        ways.append(Way(f"draft model, {most}", Speculation(most, None), runner))
    return ways


def spread(values: Sequence[float], digits: int) -> str:
    """Write the median and the range."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def compare(ways: list[Way], prompts: list[list[int]], params: SamplingParams, rounds: int) -> list[str]:
    """Let all ways answer in turns; return a line of the table for each, and fail where an answer differs."""
    runs: dict[str, list[Run]] = {way.name: [] for way in ways}
    for way in ways:
        answer(way, prompts, attrs.evolve(params, max_tokens=8))
    for number in range(rounds):
        turn = number % len(ways)
        for way in ways[turn:] + ways[:turn]:
            runs[way.name].append(answer(way, prompts, params))
    lines: list[str] = []
    for name, own in runs.items():
        if own[0].answers != runs["none"][0].answers:
            sys.exit(f"{name} changed an answer")
        speeds = [run.num_tokens / run.seconds for run in own]
        pairs = list(zip(runs["none"], own, strict=True))
        ratios = [plain.seconds / run.seconds for plain, run in pairs]
        of_cpu = [plain.cpu_seconds / run.cpu_seconds for plain, run in pairs]
        right = f"{own[0].num_accepted / own[0].num_drafted:.0%}" if own[0].num_drafted else ""
        figures = (f"{own[0].tokens_per_row:.2f}", right, spread(speeds, 0), spread(ratios, 2), spread(of_cpu, 2))
        lines.append(f"| {name} | {' | '.join(figures)} |")
    return lines


def main() -> None:
    """Compare all ways on all texts, alone and eight at a time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--spec-model")
    parser.add_argument("--drafts", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--kv-blocks", type=int, default=512)
    options = parser.parse_args()
    ways, tokenizer = make_ways(options), Tokenizer.from_directory(resolve_model(options.model))
    print("| text | sequences | way, drafts | tokens a row | drafts right | tokens/s | times as fast | by CPU time |")
    print("|---|---|---|---|---|---|---|---|")
    for text, prompts in TEXTS.items():
        for size in (1, 8):
            encoded = [tokenizer.encode(prompt) for prompt in prompts[:size]]
            params = SamplingParams(temperature=0.8, seed=1, max_tokens=options.tokens, ignore_eos=True)
            for line in compare(ways, encoded, params, options.rounds):
                print(f"| {text} | {size} {line}", flush=True)


if __name__ == "__main__":
    main()
