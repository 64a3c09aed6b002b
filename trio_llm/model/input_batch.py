"""Sequences on the device: a permanent row each, with its block tables, and the batch a plan makes of them.

Rows are never moved or compacted: a step names its rows by index and gathers them. Whatever a plan changes here it
sets to a value, it never counts on, so that the same plan, or a part of its rows, may be applied again.

Letters: B rows of this step, S its tokens, M blocks per table.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trio_llm.messages import UNKNOWN, StepPlan
from trio_llm.model.attention import AttentionBatch
from trio_llm.model.kv_cache import KVLayout

_Additions = Sequence[tuple[int, tuple[int, ...]]]


class BlockTable:
    """One KV group's table of every row, on the device."""

    def __init__(self, num_rows: int, block_size: int, device: torch.device) -> None:
        self._block_size = block_size
        self._blocks = torch.zeros((num_rows, 16), dtype=torch.int32, device=device)

    def write(self, rows: NDArray[np.intp], additions: _Additions) -> None:
        """Write additions, one (first index, block ids) per row; no ids where there is nothing to add."""
        new = [(row, first, blocks) for row, (first, blocks) in zip(rows.tolist(), additions, strict=True) if blocks]
        if not new:
            return
        self._make_room(max(first + len(blocks) for _, first, blocks in new))
        width = self._blocks.shape[1]
        places = [row * width + first + i for row, first, blocks in new for i in range(len(blocks))]
        values = [block for *_, blocks in new for block in blocks]
        device = self._blocks.device
        self._blocks.view(-1)[torch.tensor(places, device=device)] = torch.tensor(
            values, dtype=torch.int32, device=device
        )

    def _make_room(self, num_blocks: int) -> None:
        rows, width = self._blocks.shape
        if num_blocks > width:
            wider = self._blocks.new_zeros((rows, max(2 * width, num_blocks)))
            wider[:, :width] = self._blocks
            self._blocks = wider

    def gather(self, rows: Tensor, num_tokens: int) -> Tensor:
        """Return [B, M], wide enough for `num_tokens`."""
        return self._blocks[:, : -(-num_tokens // self._block_size)].index_select(0, rows)


@attrs.frozen(eq=False)
class Input:
    """One step's rows.

    Attributes:
        rows: [B], the permanent row of each.
        ends: [B], start + count: the position after the row's last token.
        offsets, lasts: [B], where the row's tokens begin in S, and where the last of them is.
        samples: [B], as in the plan.
        unknown, unknown_rows: Where in S a token is UNKNOWN, and the permanent row of each.
        drafts: B times, those of the row's last tokens that are drafts.
    """

    rows: NDArray[np.intp]
    ends: NDArray[np.int64]
    offsets: NDArray[np.int64]
    lasts: NDArray[np.int64]
    samples: NDArray[np.bool_]
    unknown: NDArray[np.intp]
    unknown_rows: NDArray[np.intp]
    drafts: Sequence[tuple[int, ...]]
    attention: AttentionBatch


class InputRows:
    """Who sits in which row."""

    def __init__(self, num_rows: int, layout: KVLayout, device: torch.device) -> None:
        self._layout, self._device = layout, device
        self._tables = [BlockTable(num_rows, group.block_size, device) for group in layout.groups]
        self._row_of: dict[int, int] = {}
        self._free = list(range(num_rows))[::-1]

    def admit(self, request_id: int) -> int:
        """Return the sequence's row, a free one if it has none yet."""
        if request_id not in self._row_of:
            assert self._free, "more sequences than max_batch_size"
            self._row_of[request_id] = self._free.pop()
        return self._row_of[request_id]

    def drop(self, request_id: int) -> int | None:
        """Free a sequence's row and return it; None if it has none."""
        row = self._row_of.pop(request_id, None)
        if row is not None:
            self._free.append(row)
        return row

    def prepare(self, plan: StepPlan) -> Input:
        """Write the plan's new blocks and gather its rows, all of them admitted before."""
        rows = np.array([self._row_of[request_id] for request_id in plan.request_ids], np.intp)
        if any(plan.new_blocks):
            nothing = ((0, ()),) * len(self._tables)
            by_group = zip(*(new or nothing for new in plan.new_blocks), strict=True)
            for table, additions in zip(self._tables, by_group, strict=True):
                table.write(rows, additions)
        counts = np.array(plan.counts, np.int64)
        ends = np.array(plan.starts, np.int64) + counts
        token_ids = np.array(plan.token_ids, np.int64)
        unknown = np.flatnonzero(token_ids == UNKNOWN)
        attention = AttentionBatch(
            torch.from_numpy(token_ids),
            plan.starts,
            plan.counts,
            self.tables(rows, int(ends.max())),
            self._layout,
            self._device,
        )
        after = np.cumsum(counts)
        unknown_rows = rows[np.searchsorted(after, unknown, side="right")]
        samples = np.array(plan.samples, np.bool_)
        drafts = _drafts(plan, after.tolist())
        return Input(rows, ends, after - counts, after - 1, samples, unknown, unknown_rows, drafts, attention)

    def tables(self, rows: NDArray[np.intp], num_tokens: int) -> list[Tensor]:
        """Return [B, M] per KV group, wide enough for `num_tokens`."""
        device_rows = torch.from_numpy(rows).to(self._device, non_blocking=True)
        return [table.gather(device_rows, num_tokens) for table in self._tables]


def _drafts(plan: StepPlan, afters: Sequence[int]) -> Sequence[tuple[int, ...]]:
    """Return each row's drafts; `afters` is where the row's tokens end in S."""
    if not plan.drafts:
        return ((),) * len(afters)
    return [plan.token_ids[after - num : after] for after, num in zip(afters, plan.drafts, strict=True)]
