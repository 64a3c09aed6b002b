"""Sequences on the device: a permanent row each, with its block tables, and the batch a plan makes of them.

Rows are never moved or compacted: a step names its rows by index and gathers them. A plan sets values here and never
increments them, so the same plan, or a part of its rows, may be applied again. One copy sends all that a step needs
from the host.

Letters: B rows of this step, S its tokens, R rows sampled in it, M blocks per table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trio_llm.messages import UNKNOWN, StepPlan
from trio_llm.model.device.device import Device
from trio_llm.model.paged.attention_batch import AttentionBatch, lay_out
from trio_llm.model.paged.kv_cache import KVLayout
from trio_llm.model.step.last_tokens import LastTokens

Column = NDArray[Any]
Value = TypeVar("Value", bound=np.generic)
_Blocks = tuple[int, tuple[int, ...]]  # the index in a table, and the blocks to write from there on
_NONE = np.zeros(0, np.intp)


class BlockTables:
    """The block tables of every row, one tensor per KV group, as wide as the longest sequence needs.

    There is one extra row: padding rows of a batch use it, and it points to the null block.

    Attributes:
        tables: Per KV group [R + 1, M] int32.
    """

    def __init__(self, num_rows: int, layout: KVLayout, max_model_len: int, device: torch.device) -> None:
        self.padding_row, self.device = num_rows, device
        self._block_sizes = [group.block_size for group in layout.groups]
        shapes = [(num_rows + 1, -(-max_model_len // size)) for size in self._block_sizes]
        self.tables = [torch.zeros(shape, dtype=torch.int32, device=device) for shape in shapes]

    def additions(self, rows: Column, new_blocks: Sequence[tuple[_Blocks, ...]]) -> list[Column]:
        """Return what a plan adds: per group flat indices [K] and the blocks [K] to write there; nothing for none."""
        if not any(new_blocks):
            return []
        columns: list[Column] = []
        for group, table in enumerate(self.tables):
            width = table.shape[1]
            places: list[int] = []
            values: list[int] = []
            for row, by_group in zip(rows.tolist(), new_blocks, strict=True):
                if by_group:
                    first, blocks = by_group[group]
                    at = row * width + first
                    places += range(at, at + len(blocks))
                    values += blocks
            columns += [np.array(places, np.int64), np.array(values, np.int32)]
        return columns

    def write(self, additions: Sequence[Tensor]) -> None:
        """Write what `additions` returned, once it is on the tables' device."""
        if additions:
            for table, places, values in zip(self.tables, additions[::2], additions[1::2], strict=True):
                if len(places):
                    table.view(-1).index_copy_(0, places, values)

    def gather(self, rows: Tensor, num_tokens: int) -> list[Tensor]:
        """Return per group [B, M], wide enough for `num_tokens`."""
        columns = zip(self.tables, self._block_sizes, strict=True)
        return [table[:, : -(-num_tokens // size)].index_select(0, rows) for table, size in columns]


@attrs.frozen(eq=False)
class _RowShape:
    """What the rows of a plan have in common with those of the plan before if the same sequences decode.

    Attributes:
        index: [B], the permanent row of each.
        counts: [B], tokens of each.
        offsets, lasts: [B], index in S of the row's first and last token.
        sampled: [n], indices in B of rows after which the plan samples, ascending.
        drafts: B times, the row's draft tokens, which are its last ones.
    """

    index: NDArray[np.intp]
    counts: NDArray[np.int64]
    offsets: NDArray[np.int64]
    lasts: NDArray[np.int64]
    sampled: NDArray[np.intp]
    drafts: Sequence[tuple[int, ...]]


@attrs.frozen(eq=False)
class PlanRows(_RowShape):
    """A plan's rows on the host.

    Attributes:
        starts, ends: [B], positions of the row's first token and after its last one.
        token_ids: [S].
        unknown: [n], indices in S of tokens that are UNKNOWN.
        additions: See BlockTables.
    """

    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    token_ids: NDArray[np.int64]
    unknown: NDArray[np.intp]
    additions: list[Column]

    @property
    def is_mixed(self) -> bool:
        """Whether a row computes more than its last known token and the drafts after it."""
        return sum(map(len, self.drafts)) + len(self.index) < len(self.token_ids)

    def sampled_from(self, at: NDArray[np.intp]) -> Column:
        """Return the indices in S to sample from, for the rows at `at`: the last known token and each draft."""
        lasts = entries(self.lasts, at)
        if not any(self.drafts):
            return lasts
        counts = np.array([len(self.drafts[i]) for i in at.tolist()], np.int64)
        return np.concatenate([np.arange(last - num, last + 1) for last, num in zip(lasts, counts, strict=True)])


@attrs.frozen(eq=False)
class StepColumns:
    """A step's columns on the device, for the forward and for sampling.

    Attributes:
        sampled_rows: Permanent rows of the sampled rows.
        sampled_from: [R], indices in S to sample from; None for all S.
    """

    columns: list[Tensor]
    sampled_rows: Tensor
    sampled_from: Tensor | None


class InputRows:
    """Assigns permanent rows to sequences and builds batches of them."""

    def __init__(self, num_rows: int, layout: KVLayout, max_model_len: int, device: Device, recent: LastTokens) -> None:
        self.tables = BlockTables(num_rows, layout, max_model_len, device.torch_device)
        self.num_rows = num_rows
        self._layout, self._device, self._last_tokens = layout, device, recent
        self._row_of: dict[int, int] = {}
        self._free = list(range(num_rows))[::-1]
        # Of the last plan without drafts; None once a row has changed its owner.
        self._last: tuple[tuple[Any, ...], _RowShape] | None = None

    def admit(self, request_id: int) -> int:
        """Return the sequence's row, a free one if it has none yet."""
        if request_id not in self._row_of:
            assert self._free, "more sequences than max_batch_size"
            self._row_of[request_id] = self._free.pop()
            self._last = None
        return self._row_of[request_id]

    def row_of(self, request_id: int) -> int | None:
        """Return a sequence's row; None if it has none."""
        return self._row_of.get(request_id)

    def request_ids(self) -> list[int]:
        """Return the requests that have a row."""
        return list(self._row_of)

    def drop(self, request_id: int) -> None:
        """Free the row of a sequence that has one."""
        self._free.append(self._row_of.pop(request_id))
        self._last = None

    def of(self, plan: StepPlan) -> PlanRows:
        """Lay out a plan's rows. All of them are admitted."""
        shape = self._shape_of(plan)
        starts = np.array(plan.starts, np.int64)
        token_ids = np.array(plan.token_ids, np.int64)
        return PlanRows(
            shape.index,
            shape.counts,
            shape.offsets,
            shape.lasts,
            shape.sampled,
            shape.drafts,
            starts,
            starts + shape.counts,
            token_ids,
            np.flatnonzero(token_ids == UNKNOWN) if UNKNOWN in plan.token_ids else _NONE,
            self.tables.additions(shape.index, plan.new_blocks),
        )

    def _shape_of(self, plan: StepPlan) -> _RowShape:
        """Return the shape of a plan's rows: that of the plan before if the same sequences decode, as in most steps."""
        key = plan.request_ids, plan.counts, plan.samples
        if not plan.drafts and self._last is not None and self._last[0] == key:
            return self._last[1]
        index = np.fromiter(map(self._row_of.__getitem__, plan.request_ids), np.intp, len(plan.request_ids))
        counts = np.array(plan.counts, np.int64)
        after = counts.cumsum()
        sampled = np.flatnonzero(np.frombuffer(bytes(plan.samples), np.bool_))
        found = _RowShape(index, counts, after - counts, after - 1, sampled, _drafts(plan, after.tolist()))
        self._last = None if plan.drafts else (key, found)
        return found

    def send(self, rows: PlanRows, at: NDArray[np.intp]) -> tuple[AttentionBatch, StepColumns]:
        """Send a ragged batch, of which the rows at `at` are sampled."""
        columns = [rows.token_ids, *lay_out(rows.starts, rows.counts), rows.index]
        sent = self._send(columns, 0, rows, at, rows.sampled_from(at))
        *columns, index = sent.columns
        tables = self.tables.gather(index, int(rows.ends.max()))
        starts, counts = rows.starts.tolist(), rows.counts.tolist()
        return AttentionBatch.of(columns, starts, counts, tables, self._layout), sent

    def send_decodes(self, rows: PlanRows, at: NDArray[np.intp], size: int) -> tuple[Tensor, StepColumns]:
        """Send single tokens, filled up to `size`: [3, size], permanent rows, tokens, positions."""
        tokens = self._single_tokens(rows.index, rows.starts, rows.counts, rows.token_ids, size)
        sent = self._send([tokens], size, rows, at, rows.sampled_from(at))
        return sent.columns[0], sent

    def resend_decodes(
        self, index: NDArray[np.intp], starts: NDArray[np.int64], token_ids: Sequence[Sequence[int]], size: int
    ) -> Tensor:
        """Send single tokens for another model that uses these rows' tables, as `send_decodes` does."""
        counts, flat = _flat(token_ids)
        (sent,) = self._device.send([self._single_tokens(index, starts, counts, flat, size)])
        return sent

    def _single_tokens(
        self,
        index: NDArray[np.intp],
        starts: NDArray[np.int64],
        counts: NDArray[np.int64],
        token_ids: NDArray[np.int64],
        size: int,
    ) -> Column:
        num_tokens = len(token_ids)
        padded = np.zeros((3, size), np.int64)
        padded[0, num_tokens:] = self.tables.padding_row
        if num_tokens == len(index):  # one token a row, as in most steps
            padded[:, :num_tokens] = index, token_ids, starts
            return padded
        positions = np.arange(num_tokens) + np.repeat(starts - (counts.cumsum() - counts), counts)
        padded[:, :num_tokens] = np.repeat(index, counts), token_ids, positions
        return padded

    def resend(
        self,
        index: NDArray[np.intp],
        starts: NDArray[np.int64],
        token_ids: Sequence[Sequence[int]],
        groups: Sequence[int],
        layout: KVLayout,
    ) -> AttentionBatch:
        """Send a batch for another model that uses these rows' tables, `groups` of them, under a layout of its own."""
        counts, flat = _flat(token_ids)
        *columns, rows = self._device.send([flat, *lay_out(starts, counts), index])
        tables = self.tables.gather(rows, int((starts + counts).max()))
        chosen = [tables[group] for group in groups]
        return AttentionBatch.of(columns, starts.tolist(), counts.tolist(), chosen, layout)

    def _send(
        self, columns: Sequence[Column], tokens_at: int, rows: PlanRows, at: NDArray[np.intp], sampled_from: Column
    ) -> StepColumns:
        """Send columns and a step's sampling indices in one copy; write new blocks and unknown tokens.

        The first column holds the token ids from `tokens_at` onwards.
        """
        whole, lacks = len(sampled_from) == len(rows.token_ids), len(rows.unknown) > 0
        others = [entries(rows.index, at)]
        if not whole:
            others.append(sampled_from)
        if lacks:
            others += [rows.unknown + tokens_at, rows.index[np.searchsorted(rows.lasts, rows.unknown)]]
        sent = iter(self._device.send([*columns, *others, *rows.additions]))
        first = [next(sent) for _ in columns]
        done = StepColumns(first, next(sent), None if whole else next(sent))
        if lacks:
            self._last_tokens.fill(first[0].view(-1), next(sent), next(sent))
        self.tables.write(list(sent))
        return done


def entries(column: NDArray[Value], at: NDArray[np.intp]) -> NDArray[Value]:
    """Return the entries of a column of all rows at ascending places; the column itself if these are all."""
    return column if len(at) == len(column) else column[at]


def _flat(token_ids: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the number of tokens of each row, and all tokens."""
    counts = np.array([len(row) for row in token_ids], np.int64)
    return counts, np.array([token_id for row in token_ids for token_id in row], np.int64)


def _drafts(plan: StepPlan, afters: Sequence[int]) -> Sequence[tuple[int, ...]]:
    """Return each row's drafts; `afters` are the ends of the rows' tokens in S."""
    if not plan.drafts:
        return ((),) * len(afters)
    return [plan.token_ids[after - num : after] for after, num in zip(afters, plan.drafts, strict=True)]
