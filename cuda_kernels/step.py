"""Prepare a decode step on a GPU: what else takes a score of small operations, in one launch for each KV group."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

from cuda_kernels.launch import kernel

THREADS = 128


class Prepared(NamedTuple):
    """What layers read, of B rows.

    Attributes:
        tables: Per KV group [B, M] int32.
        slots: Per KV group [B] int64.
        angles: Per rope cosines and sines [B, D / 2] float32.
        context: [B] int32, tokens that each row sees.
        cu_q: [B + 1] int32, 0 to B.
        padding: [B] bool.
    """

    tables: tuple[Tensor, ...]
    slots: tuple[Tensor, ...]
    angles: tuple[tuple[Tensor, Tensor], ...]
    context: Tensor
    cu_q: Tensor
    padding: Tensor


def supports(rows: Tensor) -> str | None:
    """Say why rows cannot be taken; None where they can."""
    return None if rows.dtype == torch.int64 else f"dtype {rows.dtype}"


def prepare(
    rows: Tensor,
    positions: Tensor,
    groups: Sequence[tuple[Tensor, int, int]],
    ropes: Sequence[tuple[Tensor, float]],
    padding_row: int,
) -> Prepared:
    """Look up rows [B] and their positions [B], both int64 and contiguous.

    Args:
        groups: Per KV group the tables of all rows [R, *] int32, how many of their columns are wanted, and the tokens
            of a block.
        ropes: Frequencies [D / 2] float32, and what cosines and sines are multiplied by.
        padding_row: The row whose tokens only pad the batch.
    """
    count = len(rows)
    int32 = [rows.new_empty(count + extra, dtype=torch.int32) for extra in (0, 1)]
    done = Prepared(
        tuple(table.new_empty(count, width) for table, width, _ in groups),
        tuple(rows.new_empty(count) for _ in groups),
        tuple((freq.new_empty(count, len(freq)), freq.new_empty(count, len(freq))) for freq, _ in ropes),
        int32[0], int32[1], rows.new_empty(count, dtype=torch.bool),
    )  # fmt: skip
    launched = kernel("step.cu", "prepare_step")
    shared = (done.context, done.cu_q, done.padding)
    for i, (group, rope) in enumerate(zip_longest(groups, ropes)):
        tables, width, block_size = group or (None, 0, 1)
        freq, factor = rope or (None, 0.0)
        launched(
            (count, 1, 1), (THREADS, 1, 1), 0,
            rows, positions, tables, freq, done.tables[i] if group else None, done.slots[i] if group else None,
            *(shared if i == 0 else (None,) * 3), *(done.angles[i] if rope else (None, None)),
            width, 0 if tables is None else tables.stride(0), block_size, 0 if freq is None else len(freq), padding_row,
            factor,
        )  # fmt: skip
    return done
