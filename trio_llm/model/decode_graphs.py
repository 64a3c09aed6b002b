"""Decodes as captured work: one graph for each of a few batch sizes, replayed by a single call.

A step of one token per row is a few hundred small launches, each of which costs the host more than it costs a GPU. A
graph has fixed addresses and fixed grids, so everything that differs from step to step is read from device tensors: the
rows, their tokens and positions from `_inputs`, the block tables by row from the tables of all rows. A batch between
two sizes is filled up with rows that sit in the tables' padding row: token 0 at position 0 of the null block, which
no sequence ever reads, under a context of that one token.

Letters: B rows of a graph, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import attrs
import torch
from torch import Tensor

from trio_llm.messages import Progress
from trio_llm.model.attention import AttentionBatch, slots_of
from trio_llm.model.capturing import NeedsHostError, without_host
from trio_llm.model.device import Capture
from trio_llm.model.dispatch import Dispatch, Mode, dispatching
from trio_llm.model.input_batch import BlockTables
from trio_llm.model.kv_cache import KVCache, KVLayout
from trio_llm.model.loader import Model

_log = logging.getLogger(__name__)
_ROWS = 0


def graph_sizes(max_batch_size: int) -> list[int]:
    """Return 1, 2, 4, 8, 16, 24 and so on: rows are cheap beside weights, and each graph takes a moment at start."""
    return sorted(
        {*(size for size in (1, 2, 4) if size < max_batch_size), *range(8, max_batch_size, 8), max_batch_size}
    )


@attrs.frozen(eq=False)
class _Graph:
    """One size's graph, and the calls of operations that it was made of."""

    replay: Callable[[], None]
    calls: Dispatch


class DecodeGraphs:
    """The graphs of one model, its pool and its tables."""

    def __init__(
        self, model: Model, kv: KVCache, layout: KVLayout, tables: BlockTables, max_batch_size: int, max_context: int
    ) -> None:
        """Take what graphs read and write.

        Args:
            max_context: Kernels divide a context among blocks by this bound, as how long the contexts are is known when
                a graph is replayed, not when it is captured. Short ones leave some of the blocks without work, which
                costs less than a graph per length.
        """
        self._model, self._kv, self._layout, self._tables = model, kv, layout, tables
        self._max_context = max_context
        self._inputs = torch.zeros((3, max_batch_size), dtype=torch.int64, device=tables.device)
        self._inputs[_ROWS] = tables.padding_row
        # One place for the logits of all graphs: kept where each graph leaves them, those of 256 rows and 34 smaller
        # graphs would take gigabytes. The copy is below a hundredth of the step that made them.
        self._logits = torch.empty((max_batch_size, model.vocab_size), dtype=torch.float32, device=tables.device)
        self._graphs: dict[int, _Graph] = {}

    def capture(self, capture: Capture, mode: Mode, report: Callable[[Progress], None]) -> None:
        """Capture the graphs, the largest first, whose memory the others then share.

        Each runs before it is captured, so that its kernels are compiled and loaded and its libraries have their
        workspace. Where an operation has to ask the host in the middle, nothing can be captured: that is logged.
        """
        graphs: dict[int, _Graph] = {}
        sizes = graph_sizes(self._inputs.shape[1])
        try:
            for done, size in enumerate(reversed(sizes)):
                report(Progress("capturing decode graphs", done, len(sizes), "steps"))
                graphs[size] = self._capture(capture, mode, partial(self._decode, size))
        except NeedsHostError as error:
            _log.warning("decodes run without graphs: %s", error)
            return
        report(Progress("capturing decode graphs", len(sizes), len(sizes), "steps"))
        self._graphs = dict(sorted(graphs.items()))

    def _capture(self, capture: Capture, mode: Mode, work: Callable[[], None]) -> _Graph:
        with without_host():
            with dispatching(Dispatch(mode)):
                work()
            with dispatching(Dispatch(mode)) as calls:
                return _Graph(capture(work), calls)

    def size_for(self, num_rows: int) -> int | None:
        """Return the size of the smallest graph for so many rows; None where there is none."""
        return next((size for size in self._graphs if size >= num_rows), None)

    def replay(self, decodes: Tensor, calls: Dispatch) -> Tensor:
        """Queue one step of decodes [3, B]: permanent rows, tokens, positions. B is a graph's.

        Args:
            calls: What the graph calls is added to it.
        Returns:
            Logits [B, V] float32, overwritten by the next replay.
        """
        size = decodes.shape[1]
        self._inputs[:, :size].copy_(decodes)
        graph = self._graphs[size]
        graph.replay()
        calls.add(graph.calls)
        return self._logits[:size]

    def _decode(self, size: int) -> None:
        """Do what the graph of this size does."""
        rows, token_ids, positions = self._inputs[:, :size].unbind(0)
        tables = self._tables.gather(rows, self._max_context)
        batch = AttentionBatch(
            token_ids,
            positions,
            torch.arange(size + 1, dtype=torch.int32, device=rows.device),
            (positions + 1).to(torch.int32),
            tuple(tables),
            slots_of(torch.arange(size, device=rows.device), positions, tables, self._layout),
            self._layout,
            max_q=1,
            max_context=self._max_context,
            padding=rows == self._tables.padding_row,
        )
        self._logits[:size].copy_(self._model.logits(self._model.forward(batch, self._kv)))
