"""One step's ragged batch as the layers see it.

The runner builds it once a step; every layer reads it. It knows rows, positions, block tables and slots, not requests
or sampling.

Letters: B rows (sequences), S tokens of this step over all rows, M blocks per table, T tokens per block.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from operator import add
from typing import Any, TypeVar, cast

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trio_llm.model.paged.kv_cache import KVLayout

Value = TypeVar("Value")


@attrs.frozen(eq=False)
class AttentionBatch:
    """The rows of one step and the slots of their keys and values.

    Attributes:
        token_ids: [S] int64.
        positions: [S] int64, position of each token in its sequence.
        cu_q: [B + 1] int32, where each row's tokens begin in S.
        context_lens: [B] int32, tokens a row may see: start + count.
        tables: Per KV group [B, M] int32; entries before a window and past the end are never read.
        slots: Per KV group [S] int64, where each token's key and value are written.
        layout: The pool's.
        max_q, max_context: Bounds on tokens of this step and on context over the rows.
        starts, counts: Per row, position of its first token and number of tokens, on the host; empty in a captured
            batch, which is replayed for rows that only the device knows.
        padding: [S], True for tokens of padding rows; None if there are none.
    """

    token_ids: Tensor
    positions: Tensor
    cu_q: Tensor
    context_lens: Tensor
    tables: tuple[Tensor, ...]
    slots: tuple[Tensor, ...]
    layout: KVLayout
    max_q: int
    max_context: int
    starts: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()
    padding: Tensor | None = None
    _memo: dict[Hashable, object] = attrs.field(factory=dict[Hashable, object])

    @classmethod
    def of(
        cls,
        columns: Sequence[Tensor],
        starts: Sequence[int],
        counts: Sequence[int],
        tables: Sequence[Tensor],
        layout: KVLayout,
    ) -> AttentionBatch:
        """Build the batch on the model's device.

        Args:
            columns: Token ids [S] int64, and the columns that `lay_out` returned for starts and counts.
            starts: Per row, position of its first token; all before it are in the cache.
            counts: Per row, tokens computed in this step, at least 1.
            tables: Per KV group [B, M]; M covers at least the row's start + count tokens.
        """
        token_ids, positions, rows, cu_q, context_lens = columns
        slots = slots_of(rows, positions, tables, layout)
        bounds = max(counts), max(map(add, starts, counts))
        return cls(
            token_ids,
            positions,
            cu_q,
            context_lens,
            tuple(tables),
            slots,
            layout,
            *bounds,
            tuple(starts),
            tuple(counts),
        )

    @property
    def device(self) -> torch.device:
        return self.token_ids.device

    def without_padding(self, expert_ids: Tensor) -> Tensor:
        """Return [S, K] ids with -1, no expert, for padding tokens."""
        return expert_ids if self.padding is None else expert_ids.masked_fill(self.padding[:, None], -1)

    def memo(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """Return `make()`, cached for this step under `key`: all layers of a kind share it."""
        if key not in self._memo:
            self._memo[key] = make()
        return cast("Value", self._memo[key])


def lay_out(starts: NDArray[np.int64], counts: NDArray[np.int64]) -> list[NDArray[Any]]:
    """Concatenate rows: positions [S], each token's row [S], cu_q [B + 1] and context lengths [B] int32.

    numpy on the host: a torch operation costs several times as much on arrays this small.
    """
    cu_q = np.concatenate(([0], counts.cumsum()))
    rows = np.repeat(np.arange(len(counts)), counts)
    positions = np.arange(len(rows)) + (starts - cu_q[:-1])[rows]
    return [positions, rows, cu_q.astype(np.int32), (starts + counts).astype(np.int32)]


def slots_of(rows: Tensor, positions: Tensor, tables: Sequence[Tensor], layout: KVLayout) -> tuple[Tensor, ...]:
    """Return per KV group [S] int64: the slot of each token, given its row and position [S]."""
    slots: list[Tensor] = []
    for table, group in zip(tables, layout.groups, strict=True):
        blocks = table[rows, positions // group.block_size].to(torch.int64)
        slots.append(blocks * group.block_size + positions % group.block_size)
    return tuple(slots)
