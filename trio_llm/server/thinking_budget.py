"""An end to thinking that takes too long: once its budget is spent, a grammar lets nothing come but its end."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import attrs

from trio_llm.messages import Grammar, GrammarMatcher


@attrs.frozen
class ThinkingBudget:
    """A grammar of thinking that has a budget, round what the answer is held to.

    Attributes:
        budget: Tokens that the thinking may take, its two markers apart.
        open_id, close_id: The markers. Only thinking that the output begins with is thinking.
        begun: The prompt ended inside it.
        inner: What the whole output is held to; None for nothing.
    """

    budget: int
    open_id: int | None
    close_id: int
    begun: bool
    inner: Grammar | None

    def matcher(self) -> GrammarMatcher:
        """Return the state of a sequence without output."""
        return _Matcher(self, None if self.inner is None else self.inner.matcher())


class _Matcher:
    """Where a sequence stands."""

    def __init__(self, wanted: ThinkingBudget, inner: GrammarMatcher | None) -> None:
        self._wanted = wanted
        self._inner = inner
        # Tokens that thinking may still take, None outside of it: now, and before each token, to go back to.
        self._left: list[int | None] = [wanted.budget if wanted.begun else None]

    def fill(self, address: int, num_bytes: int, /) -> str | None:
        """Write which tokens may come next; see GrammarMatcher."""
        if self._inner is None:
            ctypes.memset(address, 0xFF, num_bytes)
        elif (error := self._inner.fill(address, num_bytes)) is not None:
            return error
        byte, bit = divmod(self._wanted.close_id, 8)
        closing = ctypes.c_uint8.from_address(address + byte)
        # Inside a character of several tokens it cannot come yet.
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
        """Go back; see GrammarMatcher."""
        if self._inner is not None:
            self._inner.rollback(num_tokens)
        del self._left[len(self._left) - num_tokens :]

    def _after(self, token_id: int) -> int | None:
        left = self._left[-1]
        if left is None:
            begins = len(self._left) == 1 and token_id == self._wanted.open_id
            return self._wanted.budget if begins else None
        return None if token_id == self._wanted.close_id else max(left - 1, 0)
