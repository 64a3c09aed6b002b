"""End thinking when its budget is spent: then the grammar allows only the end marker."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import attrs

from trio_llm.params import Grammar, GrammarMatcher


@attrs.frozen
class ThinkingBudget:
    """A budget for thinking, combined with the grammar of the output.

    Attributes:
        budget: Maximum of tokens of the thinking, without its two markers.
        open_id, close_id: The markers. Thinking counts only at the start of the output.
        begun: The prompt ended inside thinking.
        inner: Grammar of the whole output; None for none.
    """

    budget: int
    open_id: int | None
    close_id: int
    begun: bool
    inner: Grammar | None

    def matcher(self) -> GrammarMatcher:
        """Return a matcher for an empty output."""
        return _Matcher(self, None if self.inner is None else self.inner.matcher())


class _Matcher:
    """The state of one sequence."""

    def __init__(self, settings: ThinkingBudget, inner: GrammarMatcher | None) -> None:
        self._settings = settings
        self._inner = inner
        # Remaining tokens of thinking, None outside of it: before each token and now, for rollback.
        self._left: list[int | None] = [settings.budget if settings.begun else None]

    def fill(self, address: int, num_bytes: int, /) -> str | None:
        """Write which tokens may come next; see GrammarMatcher."""
        if self._inner is None:
            ctypes.memset(address, 0xFF, num_bytes)
        elif (error := self._inner.fill(address, num_bytes)) is not None:
            return error
        byte, bit = divmod(self._settings.close_id, 8)
        if byte >= num_bytes:  # a tokenizer may have more ids than the model has logits
            return None
        closing = ctypes.c_uint8.from_address(address + byte)
        # Not yet inside a character of several tokens.
        if self._left[-1] == 0 and closing.value >> bit & 1:
            ctypes.memset(address, 0, num_bytes)
            closing.value = 1 << bit
        return None

    def consume(self, token_ids: Sequence[int], /) -> int:
        """Advance; see GrammarMatcher."""
        taken = len(token_ids) if self._inner is None else self._inner.consume(token_ids)
        for token_id in token_ids[:taken]:
            self._left.append(self._after(token_id))
        return taken

    def rollback(self, num_tokens: int, /) -> None:
        """Roll back tokens; see GrammarMatcher."""
        if self._inner is not None:
            self._inner.rollback(num_tokens)
        del self._left[len(self._left) - num_tokens :]

    def _after(self, token_id: int) -> int | None:
        left = self._left[-1]
        if left is None:
            begins = len(self._left) == 1 and token_id == self._settings.open_id
            return self._settings.budget if begins else None
        return None if token_id == self._settings.close_id else max(left - 1, 0)
