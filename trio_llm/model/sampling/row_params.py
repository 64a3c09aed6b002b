"""Sampling parameters by row, one row per sequence, and the columns that a step needs of them.

Rows are permanent: a sequence keeps its row from admission until it is dropped, and rows never move. A plain greedy row
costs one check of its flags per step. A step's columns are derived from the plan's positions, so gathering them twice
gives the same result. Only rows that depend on their output change while a step runs; they are rebuilt after a step
that raised.

Letters: R rows sampled in this step, V vocabulary.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from trio_llm.messages import Admission
from trio_llm.model.ops.logit_edits import EditCollector, LogitEdits, RowEdits
from trio_llm.model.sampling.counter_rng import row_keys
from trio_llm.params import SamplingParams

# What a row needs beyond argmax.
RANDOM, FILTERED, EDITED, LOGPROBS = 1, 2, 4, 8

# Colder than this is greedy; vLLM draws the line at the same place.
_GREEDY_BELOW = 1e-5

# Columns of the packed parameters: one gather and one copy to the device a step.
TEMPERATURE, TOP_K, TOP_P, MIN_P = range(4)

_NO_ROWS, _NO_COUNTS = np.zeros(0, np.intp), np.zeros(0, np.int32)

Send = Callable[[Sequence[NDArray[Any]]], list[Tensor]]


@attrs.frozen(eq=False)
class SamplingBatch:
    """The sampled rows of one step, in batch order.

    Attributes:
        flags: [R] on the host, which of RANDOM, FILTERED, EDITED, LOGPROBS each row needs; may be empty if none does.
        union: All flags or-ed.
        params: [R, 4] float32: temperature, top_k (V for all), top_p (inf for all), min_p; None if none is RANDOM.
        keys: [R, 2] int32, see counter_rng; None if none is RANDOM.
        edits: Applied to the logits first; None for none.
        logprob_rows: [n] on the host, the rows that want log-probabilities. `device_logprob_rows` is the same on the
            logits' device, None if there are none.
        num_logprobs: [n] on the host, how many of the likeliest tokens each of these wants.
        names: Per such row, further tokens that it wants. `named` [n, M] int64 is the same on the logits' device,
            padded with token 0; None if no row names any.
    """

    flags: NDArray[np.uint8]
    union: int
    params: Tensor | None = None
    keys: Tensor | None = None
    edits: LogitEdits | None = None
    logprob_rows: NDArray[np.intp] = _NO_ROWS
    device_logprob_rows: Tensor | None = None
    num_logprobs: NDArray[np.int32] = _NO_COUNTS
    names: tuple[tuple[int, ...], ...] = ()
    named: Tensor | None = None

    def without_logprobs(self) -> SamplingBatch:
        """Return the same without log-probabilities."""
        return attrs.evolve(self, flags=self.flags & ~np.uint8(LOGPROBS), device_logprob_rows=None)


_GREEDY = SamplingBatch(np.zeros(0, np.uint8), 0)


class SamplingRows:
    """Sampling parameters by row, packed when a sequence is admitted.

    Args:
        send: Copies a step's columns to where the logits are, without waiting.
    """

    def __init__(self, vocab_size: int, eos_token_ids: Sequence[int], num_rows: int, send: Send) -> None:
        self.vocab_size = vocab_size
        self._send = send
        self._eos_token_ids = tuple(eos_token_ids)
        self._fresh_seed = secrets.randbits(64)
        self._flags = np.zeros(num_rows, np.uint8)
        self._not_greedy: set[int] = set()  # The rows with flags.
        self._params = np.zeros((num_rows, 4), np.float32)
        self._seeds = np.zeros(num_rows, np.uint64)
        self._num_logprobs = np.zeros(num_rows, np.int32)
        self._names: dict[int, tuple[int, ...]] = {}
        self._edits: dict[int, RowEdits] = {}
        # Rows that depend on their output -> what they were admitted with.
        self._looking_back: dict[int, tuple[Admission, SamplingParams]] = {}
        self._invalid: set[int] = set()

    def admit(self, row: int, admission: Admission, params: SamplingParams) -> None:
        """Fill a row. Admitting the same sequence again resets it."""
        self.forget(row)
        greedy = params.temperature < _GREEDY_BELOW or params.top_k == 1
        top_k = params.top_k if 0 < params.top_k < self.vocab_size else self.vocab_size
        filtered = top_k < self.vocab_size or params.top_p < 1 or params.min_p > 0
        flags = 0 if greedy else RANDOM | (FILTERED if filtered else 0)
        temperature = 0.0 if greedy else params.temperature
        self._params[row] = temperature, top_k, params.top_p if params.top_p < 1 else np.inf, params.min_p
        # A seed drawn here depends on the request only, so its noise is the same after preemption or a repeated step.
        seed = self._fresh_seed + admission.request_id if params.seed is None else params.seed
        self._seeds[row] = seed % 2**64
        if params.logprobs is not None:
            flags |= LOGPROBS
            self._num_logprobs[row] = self.vocab_size if params.logprobs < 0 else params.logprobs
            if params.logprob_token_ids:
                self._names[row] = params.logprob_token_ids
        edits = RowEdits.of(admission, params, self._eos_token_ids, self.vocab_size)
        if edits is not None:
            flags |= EDITED
            self._edits[row] = edits
            if edits.history is not None:
                self._looking_back[row] = admission, params
        self._flags[row] = flags
        if flags:
            self._not_greedy.add(row)

    def forget(self, row: int) -> None:
        self._edits.pop(row, None)
        self._names.pop(row, None)
        self._looking_back.pop(row, None)
        self._invalid.discard(row)
        self._flags[row] = 0
        self._not_greedy.discard(row)

    @property
    def history_rows(self) -> AbstractSet[int]:
        """Rows that need their output tokens: penalties, bad words or a grammar depend on them."""
        return self._looking_back.keys()

    def set_tokens(self, row: int, start: int, token_ids: Sequence[int]) -> None:
        """Set the tokens of a row of `history_rows` from position `start` on, and drop all after them."""
        if row in self._invalid:
            self._rebuild(row, start)
        self._edits[row].set_tokens(start, token_ids)

    def invalidate(self, rows: Iterable[int]) -> None:
        """Mark rows for a rebuild at the next `set_tokens`: a step that raised may have left them half updated."""
        self._invalid.update(self._looking_back.keys() & rows)

    def _rebuild(self, row: int, length: int) -> None:
        """Rebuild the edits of a row that depends on its output, from its first `length` tokens."""
        admission, params = self._looking_back[row]
        history, num_prompt = self._edits[row].history, admission.num_prompt_tokens
        assert history is not None
        known = (*admission.token_ids[:num_prompt], *history.output[: max(0, length - num_prompt)])
        edits = RowEdits.of(attrs.evolve(admission, token_ids=known), params, self._eos_token_ids, self.vocab_size)
        assert edits is not None
        self._edits[row] = edits
        self._invalid.discard(row)

    def append_draft(self, row: int, token_id: int) -> None:
        """Append a draft token to the row's output."""
        if row in self._looking_back:
            self._edits[row].append_draft(token_id)

    def roll_back(self, row: int, position: int) -> None:
        """Remove the tokens at `position` and after it."""
        if row in self._looking_back:
            self._edits[row].roll_back(position)

    def select(
        self, rows: NDArray[np.intp], positions: NDArray[np.int64], drafts: Sequence[Sequence[int]] | None = None
    ) -> SamplingBatch:
        """Gather what sampling needs, for one row of logits per sequence and one more after each of its drafts.

        Args:
            rows: [R].
            positions: [R], the position in its sequence of the token about to be sampled, or of the first draft.
            drafts: R times, the draft tokens at `positions` onwards; None for none at all.
        """
        if not self._not_greedy:
            return _GREEDY
        first, all_rows, all_positions = np.arange(len(rows)), rows, positions
        if drafts is not None:
            counts = np.array([len(draft) + 1 for draft in drafts])
            first = counts.cumsum() - counts
            depths = np.arange(counts.sum()) - np.repeat(first, counts)
            all_rows, all_positions = np.repeat(rows, counts), np.repeat(positions, counts) + depths
        flags = self._flags[all_rows]
        union = int(np.bitwise_or.reduce(flags, initial=0))
        if not union:
            return SamplingBatch(flags, union)
        logprob_rows = np.flatnonzero(flags & LOGPROBS)
        columns: dict[str, NDArray[Any]] = {}
        if union & RANDOM:
            columns |= {"params": self._params[all_rows], "keys": row_keys(self._seeds[all_rows], all_positions)}
        if len(logprob_rows):
            columns["logprob_rows"] = logprob_rows
        names = tuple([self._names.get(row, ()) for row in all_rows[logprob_rows].tolist()])
        if any(names):
            columns["names"] = _padded(names)
        drafts = drafts or ((),) * len(rows)
        edits = self._edits_of(rows, positions, first, drafts, len(all_rows)) if union & EDITED else ()
        tensors = tuple(self._send([*columns.values(), *edits]))
        sent = dict(zip(columns, tensors, strict=False))
        return SamplingBatch(
            flags,
            union,
            params=sent.get("params"),
            keys=sent.get("keys"),
            logprob_rows=logprob_rows,
            device_logprob_rows=sent.get("logprob_rows"),
            num_logprobs=self._num_logprobs[all_rows[logprob_rows]],
            names=names,
            named=sent.get("names"),
            edits=LogitEdits(*tensors[len(columns) :]) if union & EDITED else None,
        )

    def _edits_of(
        self,
        rows: NDArray[np.intp],
        positions: NDArray[np.int64],
        first: NDArray[np.intp],
        drafts: Sequence[Sequence[int]],
        num_logits: int,
    ) -> list[NDArray[Any]]:
        """Collect the edits of all logits, each sequence's from `first` on; a draft sees the drafts before it."""
        collector = EditCollector(self.vocab_size)
        for i in np.flatnonzero(self._flags[rows] & EDITED).tolist():
            edits, position, at, draft = self._edits[int(rows[i])], int(positions[i]), int(first[i]), drafts[i]
            collector.add(at, edits, position)
            for depth, token_id in enumerate(draft, start=1):
                edits.append_draft(token_id)
                collector.add(at + depth, edits, position + depth)
            if draft:
                edits.roll_back(position)
        return collector.finish(num_logits)


def _padded(rows: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    """Return rows of different lengths as one array, filled up with 0."""
    longest = max(map(len, rows))
    return np.array([(*row, *(0,) * (longest - len(row))) for row in rows], np.int64)
