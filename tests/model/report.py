"""Measure every family against transformers and write the table of docs/exactness.md: `python -m tests.model.report`.

`--check` prints the table without writing it. Takes a few minutes on two cores; figures are those of the machine
that it runs on, to two digits.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path

import attrs
import torch
from torch import Tensor

from tests.model.families import FAMILIES
from tests.model.golden import CHUNKS, Golden, make_golden, max_difference, paged_logits
from tests.model.paged import CPU, load
from tests.model.test_reduced_precision import errors
from tests.model_runner.conftest import Golden as EngineGolden
from tests.model_runner.conftest import make_prompts
from tests.model_runner.drive import least_blocks, run
from trio_llm.config import EngineConfig
from trio_llm.model.load import load_runner
from trio_llm.model.paged.kv_cache import KVCache, KVLayout
from trio_llm.model.runner import Runner
from trio_llm.params import SamplingParams

PAGE = Path(__file__).parents[2] / "docs" / "exactness.md"
BEGIN, END = "<!-- exactness: written by python -m tests.model.report -->", "<!-- end of exactness -->"
HEAD = (
    "family",
    "architecture",
    "shape",
    "max logit difference, fp32",
    "greedy tokens equal",
    "bf16: error, KL",
    "INT8 KV: error, KL",
    "INT8 KV bytes / bf16",
    "INT8 weights: error, KL",
    "INT8 weight bytes / bf16",
)
GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
WHOLE = 0
# (prefix cache, chunk, batch size); beside these, a pool too small for the batch
WAYS = ((False, WHOLE, 1), (True, WHOLE, 1), (False, WHOLE, 16), (True, WHOLE, 16), (True, 1, 16), (True, 7, 16))


@attrs.frozen
class Row:
    """One family's figures.

    Attributes:
        equal, generated: Greedy tokens over all the ways to serve the prompts: those that transformers would have
            chosen, and all.
        preempted: How many sequences the small pool threw out on the way.
        bf16, int8_kv, int8_weights: RMS of the logit error over RMS of the logits, and mean KL in nats.
        int8_kv_bytes, int8_weight_bytes: Of bfloat16's.
    """

    name: str
    architecture: str
    shape: str
    difference: float
    equal: int
    generated: int
    preempted: int
    bf16: tuple[float, float]
    int8_kv: tuple[float, float]
    int8_kv_bytes: float
    int8_weights: tuple[float, float]
    int8_weight_bytes: float

    def cells(self) -> tuple[str, ...]:
        """Return the row's text, in HEAD's order."""
        return (
            self.name,
            f"`{self.architecture}`",
            self.shape,
            f"{self.difference:.1e}",
            f"{self.equal:,} / {self.generated:,}",
            _error(self.bf16),
            _error(self.int8_kv),
            f"{self.int8_kv_bytes:.2f}",
            _error(self.int8_weights),
            f"{self.int8_weight_bytes:.2f}",
        )


def _error(error: tuple[float, float]) -> str:
    return f"{error[0]:.1%}, {error[1]:.1e}"


def measure(name: str, directory: Path) -> Row:
    """Compare one family with transformers in every way the table tells of."""
    case = make_golden(name, directory)
    loaded = load(case.directory)
    equal, generated, preempted = greedy(case)
    int8_weights = load(case.directory, quantization="int8")
    bf16 = load(case.directory, dtype="bfloat16")
    bf16_int8 = load(case.directory, dtype="bfloat16", kv_quantization=True)
    return Row(
        name,
        json.loads((directory / "config.json").read_text())["architectures"][0],
        shape(loaded.kv_layout),
        max(max_difference(loaded, case, chunk) for chunk in CHUNKS),
        equal,
        generated,
        preempted,
        error(case, paged_logits(bf16, case, 16)),
        error(case, paged_logits(load(case.directory, kv_quantization=True), case, 16)),
        KVCache(bf16_int8.kv_layout, 64, CPU).nbytes / KVCache(bf16.kv_layout, 64, CPU).nbytes,
        error(case, paged_logits(int8_weights, case, 16)),
        load(case.directory, dtype="bfloat16", quantization="int8").plan.weight_bytes / bf16.plan.weight_bytes,
    )


def error(case: Golden, got: Tensor) -> tuple[float, float]:
    """Return relative RMS error and mean KL against transformers in float32."""
    return errors(torch.cat(case.logits), got)


def shape(layout: KVLayout) -> str:
    """Describe layers, heads and windows."""
    specs = layout.specs
    heads = sorted({(spec.num_heads, spec.num_kv_heads, spec.head_dim) for spec in specs}, key=lambda h: h[2])
    text = f"{len(specs)} layers, heads {' and '.join(f'{q}:{kv} of {dim}' for q, kv, dim in heads)}"
    if windows := sorted({spec.window for spec in specs if spec.window}):
        text += f", window {windows[0]} in {sum(spec.window is not None for spec in specs)}"
    if sharing := sum(spec.kv_layer != layer for layer, spec in enumerate(specs)):
        text += f", {sharing} share KV"
    return text


def greedy(case: Golden) -> tuple[int, int, int]:
    """Serve sixteen prompts in every way; count equal tokens, all tokens, and sequences thrown out."""
    golden = EngineGolden(case.directory, case.oracle, make_prompts())
    config = EngineConfig(model=str(case.directory), block_size=4, num_kv_blocks=640, max_batch_size=16)
    runner = load_runner(config)
    requests = [(prompt, GREEDY) for prompt in golden.prompts]
    outcomes = [run(runner, requests, caching=caching, chunk=chunk, batch_size=size) for caching, chunk, size in WAYS]
    outcomes.append(run(runner, requests, chunk=7, num_blocks=small_pool(runner)))
    pairs = [
        (token, expected)
        for outcome in outcomes
        for tokens, oracle in zip(outcome.token_ids, golden.follow_all(outcome.token_ids), strict=True)
        for token, expected in zip(tokens, oracle, strict=True)
    ]
    return sum(one == other for one, other in pairs), len(pairs), outcomes[-1].num_preempted


def small_pool(runner: Runner) -> int:
    """Return blocks in which the longest sequence fits, but not a batch."""
    return least_blocks(runner, 61, chunk=7) + 8


def render(rows: list[Row]) -> str:
    """Return the table with its markers."""
    lines = [HEAD, ("---",) * len(HEAD), *(row.cells() for row in rows)]
    return "\n".join([BEGIN, *(f"| {' | '.join(cells)} |" for cells in lines), END])


def main(arguments: list[str]) -> int:
    """Measure all families; write the page unless `--check` is given. Returns how many had no preemption."""
    torch.set_num_threads(1)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as directory:
        for name in FAMILIES:
            rows.append(measure(name, Path(directory) / name))
            print("|", " | ".join(rows[-1].cells()), "|", f"preempted {rows[-1].preempted}", flush=True)  # noqa: T201
    if "--check" not in arguments:
        text = PAGE.read_text(encoding="utf-8")
        table = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
        assert table.search(text), f"{PAGE} has lost the markers"
        PAGE.write_text(table.sub(lambda _: render(rows), text), encoding="utf-8")
    return sum(row.preempted == 0 for row in rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
