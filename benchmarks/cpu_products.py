"""One packed product on one thread of a CPU: `python benchmarks/cpu_products.py [--shape 3072x576]`.

Prints CPU time, so that other programs on the machine disturb ratios less than absolute figures. Weights are read from
copies that together do not fit the caches, so one row shows what memory gives.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from cpu_kernels import library, linear

KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}
COPIES_BYTES = 96 * 2**20
OPERATIONS = 6e9  # of a measurement


def measure(kind: str, rows: int, outputs: int, inputs: int, repetitions: int) -> str:
    """Return a line with the best of several rounds."""
    dtype = KINDS[kind]
    int8 = dtype == torch.int8
    weight = (torch.randn(outputs, inputs) * 40).to(dtype)
    packed, scale = linear.pack(weight), torch.rand(outputs) if int8 else None
    operations = 2 * outputs * inputs * rows
    count = max(1, min(COPIES_BYTES // packed.nbytes, int(OPERATIONS / operations)))
    copies = [packed.clone() for _ in range(count)]
    x = torch.randn(rows, inputs).to(torch.bfloat16 if int8 else dtype)
    times: list[float] = []
    for _ in range(repetitions):
        at = time.thread_time()
        for copy in copies:
            linear.linear(x, copy, (outputs, inputs), dtype, scale=scale)
        times.append((time.thread_time() - at) / count)
    best = min(times)
    return f"| {kind} | {rows} | {best * 1e6:.0f} | {operations / best / 1e9:.1f} | {packed.nbytes / best / 1e9:.1f} |"


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="3072x576", help="outputs x inputs")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 256])
    parser.add_argument("--repetitions", type=int, default=6)
    args = parser.parse_args()
    outputs, inputs = (int(size) for size in args.shape.split("x"))
    library.load()
    library.set_num_threads(1)
    print("| weights | rows | us | 10^9 operations/s | GB/s of weights |\n|---|---|---|---|---|")
    for kind in KINDS:
        for rows in args.rows:
            print(measure(kind, rows, outputs, inputs, args.repetitions), flush=True)


if __name__ == "__main__":
    main()
