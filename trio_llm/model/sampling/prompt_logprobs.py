"""Log-probabilities of prompt tokens, chunk by chunk.

A hidden state predicts the next token, so the entry of a chunk's first token comes from the chunk before it. Each row
keeps its entries by position until the chunk that reports them is done.

Letters: S tokens of this step, H hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Set as AbstractSet

import attrs
from torch import Tensor

from trio_llm.messages import Admission, TokenLogprobs
from trio_llm.model.sampling.logprobs import describe_logits
from trio_llm.params import SamplingParams

# Logits computed at a time: 64 MiB of them (a guess), not a chunk's length times the vocabulary.
_LOGIT_ENTRIES = 2**24


@attrs.frozen(eq=False)
class _Prompt:
    token_ids: tuple[int, ...]
    num: int
    entries: dict[int, TokenLogprobs]


class PromptScorer:
    """Holds the prompts that asked to be scored, by row."""

    def __init__(self, vocab_size: int, logits: Callable[[Tensor], Tensor]) -> None:
        self._vocab_size, self._logits = vocab_size, logits
        self._prompts: dict[int, _Prompt] = {}

    def admit(self, row: int, admission: Admission, params: SamplingParams) -> None:
        """Remember a prompt if its sequence asked for logprobs of it."""
        self.forget(row)
        if params.prompt_logprobs is not None:
            num = self._vocab_size if params.prompt_logprobs < 0 else params.prompt_logprobs
            self._prompts[row] = _Prompt(admission.token_ids[: admission.num_prompt_tokens], num, {})

    @property
    def rows(self) -> AbstractSet[int]:
        """Rows whose prompts are to be scored."""
        return self._prompts.keys()

    def wants(self, row: int, start: int) -> bool:
        """Return whether a chunk of one of `rows` that begins at `start` holds tokens of its prompt."""
        return start < len(self._prompts[row].token_ids)

    def forget(self, row: int) -> None:
        self._prompts.pop(row, None)

    def score(self, row: int, start: int, hidden: Tensor) -> tuple[TokenLogprobs | None, ...]:
        """Return one entry per prompt position in this chunk, None for position 0; empty if it holds no prompt.

        Args:
            hidden: [S, H] of the chunk's tokens, the first at `start`.
        """
        prompt = self._prompts[row]
        end = start + len(hidden)
        for old in [position for position in prompt.entries if position < start]:
            del prompt.entries[old]
        targets = prompt.token_ids[start + 1 : end + 1]
        at_once = max(1, _LOGIT_ENTRIES // self._vocab_size)
        for i in range(0, len(targets), at_once):
            some = targets[i : i + at_once]
            entries = describe_logits(self._logits(hidden[i : i + len(some)]), some, prompt.num)
            prompt.entries.update(zip(range(start + 1 + i, end + 1), entries, strict=False))
        here = range(start, min(end, len(prompt.token_ids)))
        return tuple(prompt.entries[position] if position else None for position in here)


def is_finite(entries: tuple[TokenLogprobs | None, ...]) -> bool:
    """Return whether the logits behind the entries were finite."""
    return not any(entry is not None and math.isnan(entry.logprob) for entry in entries)
