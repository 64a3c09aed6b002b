"""One step's ragged batch as the layers see it.

Built once a step by the runner; every layer reads it. Knows rows, positions, block tables and slots;
nothing of requests or sampling.

Letters: B rows (sequences), S tokens of this step over all rows, M blocks per table, T tokens per block.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from operator import add
from typing import TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from trio_llm.model.kv_cache import KVLayout

Value = TypeVar("Value")


class AttentionBatch:
    """The rows of one step and where their keys and values live.

    Attributes:
        token_ids: [S] int64.
        positions: [S] int64, position of each token in its sequence.
        cu_q: [B + 1] int32, where each row's tokens begin in S.
        context_lens: [B] int32, tokens a row may see: start + count.
        tables: Per KV group [B, M] int32; entries before a window and past the end are never read.
        slots: Per KV group [S] int64, where each token's key and value are written.
        starts, counts: The same on the host, one int per row.
        max_q, max_context: Bounds on tokens of this step and on context over the rows.
        layout: The pool's.
    """

    def __init__(
        self,
        token_ids: Sequence[int] | Tensor,
        starts: Sequence[int],
        counts: Sequence[int],
        tables: Sequence[Tensor],
        layout: KVLayout,
        device: torch.device,
    ) -> None:
        """Compute positions and slots.

        Args:
            token_ids: S tokens, row after row.
            starts: Per row, position of its first token; all before it are in the cache.
            counts: Per row, tokens computed in this step, at least 1.
            tables: Per KV group [B, M] int32 on any device; M covers at least the row's start + count tokens.
        """
        self.layout, self.device = layout, device
        self.starts, self.counts = tuple(starts), tuple(counts)
        self.max_q, self.max_context = max(self.counts), max(map(add, self.starts, self.counts))
        # numpy on the host: a torch operation costs several times as much on arrays this small
        first, count = np.array([self.starts, self.counts], np.int64)
        cu_q = np.concatenate(([0], count.cumsum()))
        rows = np.repeat(np.arange(len(count)), count)
        positions = np.arange(len(rows)) + (first - cu_q[:-1])[rows]
        self.token_ids = torch.as_tensor(token_ids, dtype=torch.int64, device=device)
        self.positions = torch.from_numpy(positions).to(device)
        self.cu_q = torch.from_numpy(cu_q.astype(np.int32)).to(device)
        self.context_lens = torch.from_numpy((first + count).astype(np.int32)).to(device)
        self.tables = tuple(table.to(device) for table in tables)
        self.slots = self._slots(torch.from_numpy(rows).to(device))
        self._memo: dict[Hashable, object] = {}

    def _slots(self, rows: Tensor) -> tuple[Tensor, ...]:
        slots: list[Tensor] = []
        for table, group in zip(self.tables, self.layout.groups, strict=True):
            blocks = table[rows, self.positions // group.block_size].to(torch.int64)
            slots.append(blocks * group.block_size + self.positions % group.block_size)
        return tuple(slots)

    def last_tokens(self) -> Tensor:
        """Return [B] int64, the index in S of each row's last token (whose hidden state is sampled from)."""
        return self.cu_q[1:].to(torch.int64) - 1

    def memo(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """Return what `make` returned for `key` earlier in this step: what all layers of a kind share."""
        if key not in self._memo:
            self._memo[key] = make()
        return cast("Value", self._memo[key])
