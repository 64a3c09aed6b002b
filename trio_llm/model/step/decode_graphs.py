"""Decodes as captured work: one graph for each of a few batch sizes, replayed by a single call.

A small step is a few hundred small launches, each of which costs the host more than it costs a GPU. A graph has fixed
addresses and fixed grids, so everything that differs from step to step is read from device tensors: the rows, their
tokens and positions from `_inputs`, the block tables by row from the tables of all rows. A batch between two sizes is
padded with the tables' padding row: token 0 at position 0 of the null block, which no sequence reads, in a context of
that one token.

A graph computes single tokens. A row with drafts, or with a few tokens of a prompt, is there once for each of its
tokens: in every layer all keys and values are written before any token attends, so each token sees those before it.

On a CPU a graph is a tape of kernel calls, recorded when its size is first needed: that costs as much as one step
without a tape.

With several ranks each has graphs of its own part, with collectives in them. All capture and replay the same sizes in
the same order.

Letters: B rows of a graph, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trio_llm.messages import KernelCall
from trio_llm.model.device.device import Capture
from trio_llm.model.device.host_sync import HostSyncError, forbid_host_sync
from trio_llm.model.loading.loader import Model
from trio_llm.model.ops import seam as ops
from trio_llm.model.ops.dispatch import Dispatch, choose_fused, dispatching
from trio_llm.model.paged.kv_cache import KVCache, KVLayout
from trio_llm.model_info import KVGroup, Progress

_log = logging.getLogger(__name__)
_ROWS = 0


def graph_sizes(max_batch_size: int) -> list[int]:
    """Return 1, 2, 4, 8, 16, 24 and so on: a row costs little more, a graph takes time at start."""
    return sorted(
        {*(size for size in (1, 2, 4) if size < max_batch_size), *range(8, max_batch_size, 8), max_batch_size}
    )


def longest_context(groups: Sequence[KVGroup], num_blocks: int, max_model_len: int) -> int:
    """Return the most tokens that a sequence of the model or of its pool can have."""
    sizes = [group.block_size for group in groups if group.window is None]
    return min([max_model_len, *(num_blocks * size for size in sizes)])


_MAX_EXACT = 32  # recorded sizes are exact up to here, then multiples of eight
# Tokens of a step that computes prompts, too. More would better share what they read of their context (a guess).
_MAX_MIXED = 32


@attrs.frozen(eq=False)
class Outputs:
    """What a graph computes of each of its tokens; the next replay of any graph overwrites it.

    Attributes:
        logits: [B, V] float32.
        likeliest: [B], the argmax of the logits, -1 where it is not finite; None unless a kernel on a CPU computes it.
    """

    logits: Tensor
    likeliest: NDArray[np.int64] | None

    def of_first(self, num_tokens: int) -> Outputs:
        """Return the same of the first tokens."""
        return Outputs(self.logits[:num_tokens], None if self.likeliest is None else self.likeliest[:num_tokens])

    def of(self, tokens: Tensor) -> Outputs:
        """Return a copy of some tokens', given their indices."""
        likeliest = None if self.likeliest is None else self.likeliest[tokens.numpy()]
        return Outputs(self.logits.index_select(0, tokens), likeliest)


@attrs.frozen(eq=False)
class _Graph:
    """One size's graph, the operation calls in it, its tokens [3, B] and what it computes."""

    replay: Callable[[], None]
    calls: tuple[KernelCall, ...]
    inputs: Tensor
    outputs: Outputs


class DecodeGraphs:
    """The graphs of one model, its pool and its tables."""

    def __init__(
        self,
        model: Model,
        kv: KVCache,
        layout: KVLayout,
        tables: Sequence[Tensor],
        padding_row: int,
        logits: Tensor,
        max_context: int,
    ) -> None:
        """Take what graphs read and write.

        Args:
            tables: Per KV group of the layout [rows, M] int32.
            padding_row: The row of tokens that only fill a batch up.
            logits: [most tokens of a graph, V] float32, [.., 0] on ranks other than 0. All graphs share it: a buffer
                for each of 35 sizes up to 256 rows would take gigabytes. The conversion to float32 writes to it.
            max_context: A bound on contexts: how long they are is known when a graph is replayed, not when it is
                captured.
        """
        self._model, self._kv, self._layout = model, kv, layout
        self._tables, self._padding_row, self._logits = tables, padding_row, logits
        self._max_context = max_context
        self._inputs = torch.zeros((3, len(logits)), dtype=torch.int64, device=logits.device)
        self._inputs[_ROWS] = padding_row
        self._likeliest: Tensor | None = None  # of the work that is captured, see Outputs
        self._graphs: dict[int, _Graph] = {}
        self._record: Callable[[int], _Graph] | None = None

    def capture(self, capture: Capture, dispatch: Dispatch, report: Callable[[Progress], None]) -> None:
        """Capture the graphs, the largest first, whose memory the others then share.

        Each runs before it is captured, so that its kernels are compiled and loaded and its libraries have their
        workspace. If an operation requires a host sync, nothing can be captured: that is logged.
        """
        graphs: dict[int, _Graph] = {}
        sizes = graph_sizes(self._inputs.shape[1])
        try:
            for done, size in enumerate(reversed(sizes)):
                report(Progress("capturing decode graphs", done, len(sizes), "steps"))
                graphs[size] = self._capture(capture, dispatch, size)
        except HostSyncError as error:
            _log.warning("decodes run without graphs: %s", error)
            return
        report(Progress("capturing decode graphs", len(sizes), len(sizes), "steps"))
        self._graphs = dict(sorted(graphs.items()))

    def record_when_needed(self, record: Capture, dispatch: Dispatch) -> None:
        """Record a graph when its size first comes, beginning with one row.

        Args:
            record: Does the work and returns a function that repeats it.
        """

        def one(size: int) -> _Graph:
            with forbid_host_sync(), dispatching(dispatch.fresh()) as calls:
                return self._graph(size, record(partial(self._decode, size)), calls)

        try:
            self._graphs = {1: one(1)}
        except HostSyncError as error:
            _log.warning("decodes run without tapes: %s", error)
            return
        self._record = one

    def _capture(self, capture: Capture, dispatch: Dispatch, size: int) -> _Graph:
        work = partial(self._decode, size)
        with forbid_host_sync():
            with dispatching(dispatch.fresh()):
                work()
            with dispatching(dispatch.fresh()) as calls:
                return self._graph(size, capture(work), calls)

    def _graph(self, size: int, replay: Callable[[], None], calls: Dispatch) -> _Graph:
        likeliest = None if self._likeliest is None else self._likeliest.numpy()
        return _Graph(replay, calls.take() or (), self._inputs[:, :size], Outputs(self._logits[:size], likeliest))

    def size_for(self, num_tokens: int, *, is_mixed: bool) -> int | None:
        """Return the size of the smallest graph that holds so many tokens; None if there is none.

        A step that computes prompts is not recorded: its size seldom comes again, and each token costs a row of logits.

        Args:
            is_mixed: Some of the tokens are of prompts.
        """
        if num_tokens > (most := self._inputs.shape[1]) or (is_mixed and num_tokens > _MAX_MIXED):
            return None
        if self._record is None:
            return next((size for size in self._graphs if size >= num_tokens), None)
        if is_mixed:
            return None
        return num_tokens if num_tokens <= _MAX_EXACT else min(-(-num_tokens // 8) * 8, most)

    def replay(self, decodes: Tensor, calls: Dispatch) -> Outputs:
        """Queue one step of tokens [3, B]: permanent rows, tokens, positions. B is a graph's.

        Args:
            calls: Gets the graph's operation calls added.
        """
        size = decodes.shape[1]
        graph = self._graphs.get(size)
        if graph is not None:
            graph.inputs.copy_(decodes)
            graph.replay()
        else:
            assert self._record is not None
            self._inputs[:, :size].copy_(decodes)
            graph = self._graphs[size] = self._record(size)
        calls.add(graph.calls)
        return graph.outputs

    def _decode(self, size: int) -> None:
        """Run the work of one graph."""
        batch = ops.prepare_decodes(
            self._inputs[:, :size],
            self._tables,
            self._padding_row,
            self._layout,
            self._model.ropes,
            self._max_context,
        )
        logits = self._logits[:size]
        self._model.logits(self._model.forward(batch, self._kv), out=logits)
        kernels = choose_fused("argmax", logits) if logits.shape[1] else None
        self._likeliest = None if kernels is None else kernels.argmax(logits)[0]
