"""Print a table of the model families: `python -m tests.model.table`.

Errors are against transformers in float32 on the checkpoints of families.py; "error" is the RMS of the logits'
difference over the RMS of the logits, KL in nats. Every number here is held to a bound by a test.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from tests.model.families import FAMILIES
from tests.model.golden import CHUNKS, NUM_GENERATED, Golden, make_golden, max_difference, paged_logits
from tests.model.paged import Paged, load
from tests.model.test_reduced_precision import errors
from trio_llm.model.loading.loader import LoadedModel

COLUMNS = (
    "checkpoint",
    "KV groups: layers x tokens a block (window)",
    "float32 max difference",
    "greedy",
    "bfloat16 error",
    "INT8 KV error, KL",
    "INT8 KV bytes / bfloat16",
    "INT8 weights error, KL",
    "INT8 weights bytes / bfloat16",
)


def describe(loaded: LoadedModel) -> str:
    """Say how the layers are grouped."""
    return ", ".join(
        f"{len(group.layers)} x {group.block_size}" + (f" ({group.window})" if group.window else "")
        for group in loaded.kv_layout.groups
    )


def row(name: str, golden: Golden) -> list[str]:
    """Measure one checkpoint."""
    plain = load(golden.directory)
    reference = torch.cat(golden.logits)
    greedy = Paged(plain, len(golden.prompts)).greedy(golden.prompts, 7, NUM_GENERATED)
    matches = sum(got == expected for got, expected in zip(greedy, golden.greedy, strict=True))
    bfloat16 = load(golden.directory, dtype="bfloat16")
    int8_kv = load(golden.directory, dtype="bfloat16", kv_quantization=True)
    int8_weights = load(golden.directory, dtype="bfloat16", quantization="int8")
    measured = [errors(reference, paged_logits(loaded, golden, 16)) for loaded in (bfloat16, int8_kv, int8_weights)]
    return [
        name,
        describe(plain),
        f"{max(max_difference(plain, golden, chunk) for chunk in CHUNKS):.1e}",
        f"{matches}/{len(greedy)}",
        f"{measured[0][0]:.3f}",
        f"{measured[1][0]:.3f}, {measured[1][1]:.4f}",
        f"{int8_kv.kv_layout.block_bytes / bfloat16.kv_layout.block_bytes:.2f}",
        f"{measured[2][0]:.3f}, {measured[2][1]:.4f}",
        f"{int8_weights.plan.weight_bytes / bfloat16.plan.weight_bytes:.2f}",
    ]


def main() -> None:
    """Measure all of them."""
    torch.set_num_threads(1)
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")  # noqa: T201 - a script
    with tempfile.TemporaryDirectory() as directory:
        for name in FAMILIES:
            print(f"| {' | '.join(row(name, make_golden(name, Path(directory) / name)))} |")  # noqa: T201


if __name__ == "__main__":
    main()
