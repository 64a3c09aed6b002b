"""Sequences on the device: a permanent row each, with its block tables, and the batch a plan makes of them.

Rows are never moved or compacted: a step names its rows by index and gathers them. Whatever a plan changes here it
sets to a value, it never counts on, so that the same plan, or a part of its rows, may be applied again. All that a step
needs of the host travels in one copy.

Letters: B rows of this step, S its tokens, R rows sampled in it, M blocks per table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trio_llm.messages import UNKNOWN, StepPlan
from trio_llm.model.attention import AttentionBatch, lay_out
from trio_llm.model.device import Device
from trio_llm.model.kv_cache import KVLayout
from trio_llm.model.recent_tokens import RecentTokens

Column = NDArray[Any]
_Blocks = tuple[int, tuple[int, ...]]  # the index in a table, and the blocks to write from there on


class BlockTables:
    """The block tables of every row, one tensor per KV group, as wide as the longest sequence needs.

    There is one row more than sequences have: rows that fill a batch up point there, to the null block.
    """

    def __init__(self, num_rows: int, layout: KVLayout, max_model_len: int, device: torch.device) -> None:
        self.padding_row, self.device = num_rows, device
        self._block_sizes = [group.block_size for group in layout.groups]
        shapes = [(num_rows + 1, -(-max_model_len // size)) for size in self._block_sizes]
        self._tables = [torch.zeros(shape, dtype=torch.int32, device=device) for shape in shapes]

    def additions(self, rows: Column, new_blocks: Sequence[tuple[_Blocks, ...]]) -> list[Column]:
        """Return what a plan adds: per group flat places [K] and the blocks [K] to write there."""
        if not any(new_blocks):
            return [np.zeros(0, kind) for _ in self._tables for kind in (np.int64, np.int32)]
        columns: list[Column] = []
        for group, table in enumerate(self._tables):
            by_row = zip(rows.tolist(), new_blocks, strict=True)
            added = [(row, *blocks[group]) for row, blocks in by_row if blocks]
            width = table.shape[1]
            places = [np.arange(len(blocks)) + (row * width + first) for row, first, blocks in added if blocks]
            values = [block for _, _, blocks in added for block in blocks]
            columns += [np.concatenate([np.zeros(0, np.int64), *places]), np.array(values, np.int32)]
        return columns

    def write(self, additions: Sequence[Tensor]) -> None:
        """Write what `additions` laid out, once it is where the tables are."""
        for table, places, values in zip(self._tables, additions[::2], additions[1::2], strict=True):
            if len(places):
                table.view(-1).index_copy_(0, places, values)

    def gather(self, rows: Tensor, num_tokens: int) -> list[Tensor]:
        """Return per group [B, M], wide enough for `num_tokens`."""
        columns = zip(self._tables, self._block_sizes, strict=True)
        return [table[:, : -(-num_tokens // size)].index_select(0, rows) for table, size in columns]


@attrs.frozen(eq=False)
class PlanRows:
    """A plan's rows on the host.

    Attributes:
        index: [B], the permanent row of each.
        starts, counts, ends: [B]; end is the position after the row's last token.
        offsets, lasts: [B], where the row's tokens begin in S, and where the last of them is.
        token_ids: [S].
        unknown: [n], where in S a token is UNKNOWN.
        samples: [B], as in the plan.
        drafts: B times, those of the row's last tokens that are drafts.
        additions: As of BlockTables.
    """

    index: NDArray[np.intp]
    starts: NDArray[np.int64]
    counts: NDArray[np.int64]
    ends: NDArray[np.int64]
    offsets: NDArray[np.int64]
    lasts: NDArray[np.int64]
    token_ids: NDArray[np.int64]
    unknown: NDArray[np.intp]
    samples: NDArray[np.bool_]
    drafts: Sequence[tuple[int, ...]]
    additions: list[Column]

    def sampled_from(self, at: NDArray[np.intp]) -> Column:
        """Return where in S it is sampled for the rows at `at`: after the last known token and after each draft."""
        lasts = self.lasts[at]
        counts = np.array([len(self.drafts[i]) for i in at.tolist()], np.int64)
        if not counts.any():
            return lasts
        return np.concatenate([np.arange(last - num, last + 1) for last, num in zip(lasts, counts, strict=True)])


@attrs.frozen(eq=False)
class Sent:
    """What a step's forward and sampling need, where the model is.

    Attributes:
        sampled_rows: Permanent rows of those that are sampled.
        sampled_from: [R], the places in the batch that are sampled from.
    """

    columns: list[Tensor]
    sampled_rows: Tensor
    sampled_from: Tensor


class InputRows:
    """Who sits in which row."""

    def __init__(
        self, num_rows: int, layout: KVLayout, max_model_len: int, device: Device, recent: RecentTokens
    ) -> None:
        self.tables = BlockTables(num_rows, layout, max_model_len, device.torch_device)
        self.num_rows = num_rows
        self._layout, self._device, self._recent = layout, device, recent
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

    def of(self, plan: StepPlan) -> PlanRows:
        """Lay out a plan's rows, all of them admitted before."""
        index = np.array([self._row_of[request_id] for request_id in plan.request_ids], np.intp)
        starts, counts = np.array([plan.starts, plan.counts], np.int64)
        after = counts.cumsum()
        token_ids = np.array(plan.token_ids, np.int64)
        return PlanRows(
            index,
            starts,
            counts,
            starts + counts,
            after - counts,
            after - 1,
            token_ids,
            np.flatnonzero(token_ids == UNKNOWN),
            np.array(plan.samples, np.bool_),
            _drafts(plan, after.tolist()),
            self.tables.additions(index, plan.new_blocks),
        )

    def send(self, rows: PlanRows, at: NDArray[np.intp]) -> tuple[AttentionBatch, Sent]:
        """Send a ragged batch, of which the rows at `at` are sampled."""
        columns = [rows.token_ids, *lay_out(rows.starts, rows.counts), rows.index]
        sent = self._send(columns, 0, rows, at, rows.sampled_from(at))
        *columns, index = sent.columns
        tables = self.tables.gather(index, int(rows.ends.max()))
        starts, counts = rows.starts.tolist(), rows.counts.tolist()
        return AttentionBatch.of(columns, starts, counts, tables, self._layout), sent

    def send_decodes(self, rows: PlanRows, at: NDArray[np.intp], size: int) -> tuple[Tensor, Sent]:
        """Send a batch of one token per row, filled up to `size`: [3, size], permanent rows, tokens, positions."""
        padded = np.zeros((3, size), np.int64)
        padded[0] = self.tables.padding_row
        padded[:, : len(rows.index)] = rows.index, rows.token_ids, rows.starts
        sent = self._send([padded.reshape(-1)], size, rows, at, at)
        return sent.columns[0].view(3, size), sent

    def resend(
        self,
        index: NDArray[np.intp],
        starts: NDArray[np.int64],
        token_ids: Sequence[Sequence[int]],
        groups: Sequence[int],
        layout: KVLayout,
    ) -> AttentionBatch:
        """Send a batch for another model that uses these rows' tables, `groups` of them, under a layout of its own."""
        counts = np.array([len(row) for row in token_ids], np.int64)
        flat = np.array([token_id for row in token_ids for token_id in row], np.int64)
        *columns, rows = self._device.send([flat, *lay_out(starts, counts), index])
        tables = self.tables.gather(rows, int((starts + counts).max()))
        chosen = [tables[group] for group in groups]
        return AttentionBatch.of(columns, starts.tolist(), counts.tolist(), chosen, layout)

    def _send(
        self, columns: Sequence[Column], tokens_at: int, rows: PlanRows, at: NDArray[np.intp], sampled_from: Column
    ) -> Sent:
        """Send columns and what every step needs besides in one copy; write new blocks, and tokens that were unknown.

        The first column holds the token ids from `tokens_at` onwards.
        """
        unknown_rows = rows.index[np.searchsorted(rows.lasts, rows.unknown)]
        others = [rows.index[at], sampled_from, rows.unknown + tokens_at, unknown_rows, *rows.additions]
        tensors = self._device.send([*columns, *others])
        sampled_rows, sampled_from_there, places, from_rows, *additions = tensors[len(columns) :]
        self.tables.write(additions)
        if len(places):
            self._recent.fill(tensors[0], places, from_rows)
        return Sent(tensors[: len(columns)], sampled_rows, sampled_from_there)


def _drafts(plan: StepPlan, afters: Sequence[int]) -> Sequence[tuple[int, ...]]:
    """Return each row's drafts; `afters` is where the row's tokens end in S."""
    if not plan.drafts:
        return ((),) * len(afters)
    return [plan.token_ids[after - num : after] for after, num in zip(afters, plan.drafts, strict=True)]
