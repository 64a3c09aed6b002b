"""What each sequence asked of the sampler, one row per sequence, and the columns a step needs of it.

Rows are permanent: a sequence keeps its row from admission until it is dropped, nothing is moved. Plain greedy rows
cost nothing per step beyond one look at their flags. Everything a step needs is derived from the plan's positions, so
asking twice gives the same answer.

Letters: R rows sampled in this step, V vocabulary.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from trio_llm.messages import Admission, SamplingParams
from trio_llm.model.counter_rng import row_keys
from trio_llm.model.logit_edits import EditCollector, LogitEdits, RowEdits

# What a row needs beyond argmax.
RANDOM, FILTERED, EDITED, LOGPROBS = 1, 2, 4, 8

# Colder than this is greedy; vLLM draws the line at the same place.
_GREEDY_BELOW = 1e-5

# Columns of the packed parameters: one gather and one copy to the device a step.
TEMPERATURE, TOP_K, TOP_P, MIN_P = range(4)


Send = Callable[[Sequence[NDArray[Any]]], list[Tensor]]


@attrs.frozen(eq=False)
class SamplingBatch:
    """The sampled rows of one step, in batch order.

    Attributes:
        flags: [R] on the host, which of RANDOM, FILTERED, EDITED, LOGPROBS each row needs.
        union: All flags or-ed.
        params: [R, 4] float32: temperature, top_k (V for all), top_p (inf for all), min_p; None if none is RANDOM.
        keys: [R, 2] int32, see counter_rng; None if none is RANDOM.
        edits: What is done to the logits first; None for nothing.
        asking: [n] on the host, the rows that want log-probabilities, and `asking_rows` the same where logits are; None
            if there is none.
        num_logprobs: [n] on the host, how many of the likeliest each of these wants named.
        names: Per asking row, tokens that it wants named besides; `named` [n, M] int64 the same where logits are,
            filled up with any tokens; None where no row names any.
    """

    flags: NDArray[np.uint8]
    union: int
    params: Tensor | None
    keys: Tensor | None
    edits: LogitEdits | None
    asking: NDArray[np.intp]
    asking_rows: Tensor | None
    num_logprobs: NDArray[np.int32]
    names: tuple[tuple[int, ...], ...]
    named: Tensor | None

    def without_logprobs(self) -> SamplingBatch:
        """Return the same for tokens that nobody is told of."""
        return attrs.evolve(self, flags=self.flags & ~np.uint8(LOGPROBS), asking_rows=None)


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
        self._params = np.zeros((num_rows, 4), np.float32)
        self._seeds = np.zeros(num_rows, np.uint64)
        self._num_logprobs = np.zeros(num_rows, np.int32)
        self._names: dict[int, tuple[int, ...]] = {}
        self._edits: dict[int, RowEdits] = {}
        self._looking_back: set[int] = set()

    def admit(self, row: int, admission: Admission, params: SamplingParams) -> None:
        """Fill a row. Admitting the same sequence again starts it afresh."""
        self.forget(row)
        greedy = params.temperature < _GREEDY_BELOW or params.top_k == 1
        top_k = params.top_k if 0 < params.top_k < self.vocab_size else self.vocab_size
        filtered = top_k < self.vocab_size or params.top_p < 1 or params.min_p > 0
        flags = 0 if greedy else RANDOM | (FILTERED if filtered else 0)
        temperature = 0.0 if greedy else params.temperature
        self._params[row] = temperature, top_k, params.top_p if params.top_p < 1 else np.inf, params.min_p
        # A seed drawn here depends on the request only: its dice stay the same after a preemption or a repeated step.
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
                self._looking_back.add(row)
        self._flags[row] = flags

    def forget(self, row: int) -> None:
        self._edits.pop(row, None)
        self._names.pop(row, None)
        self._looking_back.discard(row)
        self._flags[row] = 0

    @property
    def history_rows(self) -> AbstractSet[int]:
        """Rows that must be told of their output: penalties, bad words or a grammar look back at it."""
        return self._looking_back

    def learn(self, row: int, start: int, token_ids: Sequence[int]) -> None:
        """Tell a row of `history_rows` that `token_ids` stand at `start` onwards, and nothing after them."""
        self._edits[row].learn(start, token_ids)

    def suppose(self, row: int, token_id: int) -> None:
        """Go on as if this were the row's next token."""
        if row in self._looking_back:
            self._edits[row].suppose(token_id)

    def take_back(self, row: int, position: int) -> None:
        """Forget what was supposed at `position` and after it."""
        if row in self._looking_back:
            self._edits[row].take_back(position)

    def select(
        self, rows: NDArray[np.intp], positions: NDArray[np.int64], drafts: Sequence[Sequence[int]] | None = None
    ) -> SamplingBatch:
        """Gather what sampling needs, for one row of logits per sequence and one more after each of its drafts.

        Args:
            rows: [R].
            positions: [R], the position in its sequence of the token about to be sampled, or of the first draft.
            drafts: R times, the tokens that are supposed to stand at `positions` onwards; None for none at all.
        """
        first = np.arange(len(rows))
        if drafts is not None:
            counts = np.array([len(draft) + 1 for draft in drafts])
            first = counts.cumsum() - counts
            depths = np.arange(counts.sum()) - np.repeat(first, counts)
            all_rows, all_positions = np.repeat(rows, counts), np.repeat(positions, counts) + depths
        else:
            all_rows, all_positions = rows, positions
        flags = self._flags[all_rows]
        union = int(np.bitwise_or.reduce(flags, initial=0))
        asking = np.flatnonzero(flags & LOGPROBS)
        columns: list[NDArray[Any]] = []
        if union & RANDOM:
            columns += self._params[all_rows], row_keys(self._seeds[all_rows], all_positions)
        if len(asking):
            columns.append(asking)
        names = tuple([self._names.get(row, ()) for row in all_rows[asking].tolist()]) if len(asking) else ()
        if any(names):
            most = max(map(len, names))
            columns.append(np.array([(*row, *(0,) * (most - len(row))) for row in names], np.int64))
        if union & EDITED:
            columns += self._edits_of(rows, positions, first, drafts or ((),) * len(rows), len(all_rows))
        sent = iter(self._send(columns))
        return SamplingBatch(
            flags,
            union,
            params=next(sent) if union & RANDOM else None,
            keys=next(sent) if union & RANDOM else None,
            asking=asking,
            asking_rows=next(sent) if len(asking) else None,
            num_logprobs=self._num_logprobs[all_rows[asking]],
            names=names,
            named=next(sent) if any(names) else None,
            edits=LogitEdits(*sent) if union & EDITED else None,
        )

    def _edits_of(
        self,
        rows: NDArray[np.intp],
        positions: NDArray[np.int64],
        first: NDArray[np.intp],
        drafts: Sequence[Sequence[int]],
        num_logits: int,
    ) -> list[NDArray[Any]]:
        """Collect the edits of all logits, those of each sequence from `first` on; a draft sees the ones before it."""
        collector = EditCollector(self.vocab_size)
        for row, position, at, draft in zip(rows.tolist(), positions.tolist(), first.tolist(), drafts, strict=True):
            edits = self._edits.get(row)
            if edits is None:
                continue
            collector.add(at, edits, position)
            for depth, token_id in enumerate(draft, start=1):
                edits.suppose(token_id)
                collector.add(at + depth, edits, position + depth)
            if draft:
                edits.take_back(position)
        return collector.finish(num_logits)
