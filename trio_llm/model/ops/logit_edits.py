"""Edit logits before sampling: allow, forbid, bias, penalise; in vLLM's order.

Edits are few tokens per row, so they travel as flat (row * V + token id) index arrays and touch those entries
only: a penalty costs what the sequence's distinct tokens cost, not a pass over the vocabulary, and its memory is the
history it looks at.

Letters: R rows, V vocabulary, K edited entries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trio_llm.messages import Admission
from trio_llm.params import GrammarMatcher, SamplingParams

_Ids = NDArray[np.int64]
_Bits = NDArray[np.int32]  # [ceil(V / 32)], a bit per token that may be sampled, little-endian
_NO_IDS: _Ids = np.zeros(0, np.int64)


class TokenHistory:
    """The tokens of one sequence, and how often each distinct one occurs in its output."""

    def __init__(self, admission: Admission) -> None:
        prompt, output = (
            admission.token_ids[: admission.num_prompt_tokens],
            admission.token_ids[admission.num_prompt_tokens :],
        )
        self.output: list[int] = []
        self._num_prompt = len(prompt)
        self._index: dict[int, int] = {}
        self._ids = np.zeros(64, np.int64)
        self._counts = np.zeros(64, np.float32)
        for token_id in prompt:
            self._slot(token_id)
        self._num_prompt_ids = len(self._index)
        for token_id in output:
            self.append(token_id)

    def _slot(self, token_id: int) -> int:
        """Return the index of the token's count, growing the array for a new token."""
        slot = self._index.setdefault(token_id, len(self._index))
        if slot == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[slot] = token_id
        return slot

    def append(self, token_id: int) -> None:
        """Add a token to the output."""
        slot = self._slot(token_id)  # before self._counts is read: a new slot may replace the array
        self._counts[slot] += 1
        self.output.append(token_id)

    def cut(self, length: int) -> None:
        """Forget the output beyond so many tokens of prompt and output."""
        while self._num_prompt + len(self.output) > length and self.output:
            token_id = self.output.pop()
            slot = self._index[token_id]
            self._counts[slot] -= 1
            if not self._counts[slot] and slot >= self._num_prompt_ids:
                # Tokens that came after its first place are gone already, so its slot is the last one.
                del self._index[token_id]

    def set_tokens(self, start: int, token_ids: Sequence[int]) -> int:
        """Set the tokens from position `start` on, drop all after them; return how many output tokens stayed."""
        assert start <= self._num_prompt + len(self.output), "a token before start is missing"
        self.cut(max(start, self._num_prompt))
        kept = len(self.output)
        for token_id in token_ids[max(0, self._num_prompt - start) :]:
            self.append(token_id)
        return kept

    @property
    def ids(self) -> _Ids:
        """Distinct tokens of prompt and output."""
        return self._ids[: len(self._index)]

    @property
    def counts(self) -> NDArray[np.float32]:
        """How often each of `ids` occurs in the output; 0 for those of the prompt only."""
        return self._counts[: len(self._index)]


class GrammarState:
    """One sequence's grammar matcher. It catches up with the history when a mask is needed."""

    def __init__(self, matcher: GrammarMatcher) -> None:
        self._matcher = matcher
        self._num_consumed = 0

    def rewind(self, num_output: int) -> None:
        """Roll back to the state after `num_output` output tokens, if the matcher is beyond it."""
        if num_output < self._num_consumed:
            self._matcher.rollback(self._num_consumed - num_output)
            self._num_consumed = num_output

    def write_mask(self, output: Sequence[int], mask: _Bits) -> None:
        """Write which tokens may follow `output`, one bit each; none if the grammar has no continuation."""
        if len(output) > self._num_consumed:
            self._num_consumed += self._matcher.consume(output[self._num_consumed :])
        # A draft may violate the grammar. The position before it rejects it, so the mask after it does not matter.
        if self._num_consumed < len(output) or self._matcher.fill(mask.ctypes.data, mask.nbytes) is not None:
            mask.fill(0)


@attrs.frozen(eq=False)
class RowEdits:
    """One sequence's edits.

    Attributes:
        allowed: None for all.
        held_back: End-of-sequence and stop ids, masked before position `first_end`.
        history: None if no edit depends on earlier tokens.
    """

    allowed: _Bits | None
    bad_words: tuple[tuple[int, ...], ...]
    held_back: _Ids
    first_end: int
    bias_ids: _Ids
    bias: NDArray[np.float32]
    repetition: float
    presence: float
    frequency: float
    history: TokenHistory | None
    grammar: GrammarState | None

    @classmethod
    def of(
        cls, admission: Admission, params: SamplingParams, eos_token_ids: tuple[int, ...], vocab_size: int
    ) -> RowEdits | None:
        """Return the edits that `params` ask for, None for none."""
        penalised = params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
        held_back = {*eos_token_ids, *params.stop_token_ids} if params.min_tokens else ()
        only, grammar = params.allowed_token_ids, params.grammar
        looks_back = penalised or bool(params.bad_words_token_ids) or grammar is not None
        if only is None and not (looks_back or held_back or params.logit_bias):
            return None
        return cls(
            allowed=None if only is None else _bits_of(only, vocab_size),
            bad_words=params.bad_words_token_ids,
            held_back=np.array(sorted(held_back), np.int64),
            first_end=admission.num_prompt_tokens + params.min_tokens,
            bias_ids=np.array(list(params.logit_bias), np.int64),
            bias=np.array(list(params.logit_bias.values()), np.float32),
            repetition=params.repetition_penalty,
            presence=params.presence_penalty,
            frequency=params.frequency_penalty,
            history=TokenHistory(admission) if looks_back else None,
            grammar=None if grammar is None else GrammarState(grammar.matcher()),
        )

    def set_tokens(self, start: int, token_ids: Sequence[int]) -> None:
        """Set the tokens from position `start` on, and drop all after them. Idempotent."""
        if self.history is not None:
            kept = self.history.set_tokens(start, token_ids)
            if self.grammar is not None:
                self.grammar.rewind(kept)

    def append_draft(self, token_id: int) -> None:
        """Append a draft token to the output."""
        if self.history is not None:
            self.history.append(token_id)

    def roll_back(self, position: int) -> None:
        """Remove the tokens at `position` and after it."""
        self.set_tokens(position, ())

    @property
    def penalised(self) -> bool:
        return self.repetition != 1 or self.presence != 0 or self.frequency != 0

    def mask(self, vocab_size: int) -> _Bits | None:
        """Return the tokens that grammar and allowed tokens permit; None for all."""
        if self.grammar is None:
            return self.allowed
        assert self.history is not None
        mask = np.zeros(-(-vocab_size // 32), np.int32)
        self.grammar.write_mask(self.history.output, mask)
        return mask if self.allowed is None else mask & self.allowed

    def masked(self, position: int) -> _Ids:
        """Return the ids that may not be sampled at `position` (duplicates do no harm)."""
        output = self.history.output if self.history else []
        bad = [word[-1] for word in self.bad_words if _ends_with(output, word[:-1])]
        held_back = self.held_back if position < self.first_end else _NO_IDS
        return np.concatenate([held_back, np.array(bad, np.int64)])


def _bits_of(token_ids: Sequence[int], vocab_size: int) -> _Bits:
    flags = np.zeros(-(-vocab_size // 32) * 32, np.bool_)
    flags[list(token_ids)] = True
    return np.packbits(flags, bitorder="little").view(np.int32)


def _ends_with(output: Sequence[int], words: tuple[int, ...]) -> bool:
    return not words or tuple(output[-len(words) :]) == words


@attrs.frozen(eq=False)
class LogitEdits:
    """The edits of one step. Entries are flat: row * V + token id.

    Attributes:
        starts: [4, R + 1] int32, where each row begins in masked, biased, seen and masks.
        masked: [K], may not be sampled.
        biased, bias: [K] and what is added there.
        seen, penalties: [K], prompt and output tokens of penalised rows, and [4, K]: their counts in the output,
            repetition, presence and frequency penalty.
        masks: [n, ceil(V / 32)] int32, a bit per token that may be sampled.
        bound: [n], the rows of these masks.
    """

    starts: Tensor
    masked: Tensor
    biased: Tensor
    bias: Tensor
    seen: Tensor
    penalties: Tensor
    masks: Tensor
    bound: Tensor

    def apply(self, logits: Tensor, mask: Callable[[Tensor, Tensor, Tensor], None]) -> None:
        """Edit [R, V] float32, contiguous, in place; `mask` is `forbid`, or a kernel that does the same."""
        if len(self.bound):
            mask(logits, self.masks, self.bound)
        flat = logits.view(-1)
        if len(self.masked):
            flat[self.masked] = -torch.inf
        if len(self.biased):
            flat.index_add_(0, self.biased, self.bias)
        if len(self.seen):
            counts, repetition, presence, frequency = self.penalties.unbind(0)
            seen = flat[self.seen]
            seen = torch.where(seen > 0, seen / repetition, seen * repetition)
            flat[self.seen] = seen - frequency * counts - presence * (counts > 0)


def forbid(logits: Tensor, masks: Tensor, rows: Tensor) -> None:
    """Set what masks [n, ceil(V / 32)] forbid in these rows [n] of logits [R, V] to -infinity, in place."""
    bits = masks[:, :, None] >> torch.arange(32, dtype=torch.int32, device=logits.device)
    forbidden = (bits & 1 == 0).view(len(rows), -1)[:, : logits.shape[1]]
    logits[rows] = logits[rows].masked_fill_(forbidden, -torch.inf)


class EditCollector:
    """Concatenates the edits of a step's rows, each as of when it is added."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._rows: list[int] = []
        self._counts: list[tuple[int, int, int, int]] = []
        self._bound: list[int] = []
        self._masks: list[_Bits] = []
        self._masked: list[_Ids] = []
        self._biased: list[_Ids] = []
        self._bias: list[NDArray[np.float32]] = []
        self._seen: list[_Ids] = []
        self._penalties: list[NDArray[np.float32]] = []

    def add(self, row: int, edits: RowEdits, position: int) -> None:
        """Add the edits of row `row` of the logits, from which the token at `position` is sampled.

        Rows come in ascending order, each at most once.
        """
        first = row * self._vocab_size
        masked, mask = edits.masked(position), edits.mask(self._vocab_size)
        self._masked.append(first + masked)
        self._biased.append(first + edits.bias_ids)
        self._bias.append(edits.bias)
        num_seen = 0
        if edits.penalised and edits.history is not None:
            ids, factors = edits.history.ids, (edits.repetition, edits.presence, edits.frequency)
            num_seen = len(ids)
            columns = np.broadcast_to(np.array(factors, np.float32)[:, None], (3, num_seen))
            self._seen.append(first + ids)
            self._penalties.append(np.concatenate([edits.history.counts[None], columns]))
        if mask is not None:
            self._bound.append(row)
            self._masks.append(mask)
        self._rows.append(row)
        self._counts.append((len(masked), len(edits.bias_ids), num_seen, mask is not None))

    def finish(self, num_rows: int) -> list[NDArray[Any]]:
        """Return the fields of LogitEdits, on the host."""
        starts = np.zeros((4, num_rows + 1), np.int32)
        starts[:, np.array(self._rows) + 1] = np.array(self._counts).T
        return [
            starts.cumsum(1, dtype=np.int32),
            np.concatenate([_NO_IDS, *self._masked]),
            np.concatenate([_NO_IDS, *self._biased]),
            np.concatenate([np.zeros(0, np.float32), *self._bias]),
            np.concatenate([_NO_IDS, *self._seen]),
            np.concatenate([np.zeros((4, 0), np.float32), *self._penalties], axis=1),
            np.array(self._masks, np.int32).reshape(len(self._masks), -(-self._vocab_size // 32)),
            np.array(self._bound, np.int64),
        ]
