"""Prepare a decode step on a CPU: else a dozen small operations, whose code is cold after all the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cpu_kernels.library import empty, kernels


class Prepared(NamedTuple):
    """What layers read, of B rows.

    Attributes:
        tables: Per KV group [B, M] int32.
        slots: Per KV group [B] int64.
        context: [B] int32, tokens that each row sees.
        cu_q: [B + 1] int32, 0 to B.
        padding: [B] bool.
    """

    tables: tuple[Tensor, ...]
    slots: tuple[Tensor, ...]
    context: Tensor
    cu_q: Tensor
    padding: Tensor


def prepare(rows: Tensor, positions: Tensor, groups: Sequence[tuple[Tensor, int, int]], padding_row: int) -> Prepared:
    """Look up rows [B] and their positions [B], both int64 and contiguous.

    Args:
        groups: Per KV group the tables of all rows [R, *] int32, how many of their columns are wanted, and the tokens
            of a block.
        padding_row: The row whose tokens only pad the batch.
    """
    count = len(rows)
    done = Prepared(
        tuple(empty((count, width), torch.int32) for _, width, _ in groups),
        tuple(empty((count,), torch.int64) for _ in groups),
        empty((count,), torch.int32), empty((count + 1,), torch.int32), empty((count,), torch.bool),
    )  # fmt: skip
    kernels()["prepare_contexts"](rows, positions, done.context, done.cu_q, done.padding, count, padding_row)
    for (tables, width, block_size), own, slots in zip(groups, done.tables, done.slots, strict=True):
        kernels()["prepare_tables"](rows, positions, tables, own, slots, count, width, tables.stride(0), block_size)
    return done
