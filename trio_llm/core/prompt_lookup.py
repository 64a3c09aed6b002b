"""Prompt look-up: draft tokens by finding the last n-gram earlier in the sequence.

If the last few tokens occurred before, the draft is what followed them there. It needs no model and knows tokens only;
the model verifies the drafts.

Source: Saxena 2023, "Prompt Lookup Decoding"; the copy that overlaps itself is that of Ziv and Lempel 1977.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs

# Tokens indexed in one call, half a millisecond. A long prompt is indexed over several steps.
TOKENS_PER_CALL = 1024


@attrs.frozen
class LookupSizes:
    """Lengths of the n-grams: `longest` is tried first, `shortest` last."""

    shortest: int
    longest: int

    def __attrs_post_init__(self) -> None:
        assert 1 <= self.shortest <= self.longest


class PromptLookup:
    """An index of the last occurrence of each n-gram in one growing sequence.

    A token costs one dictionary entry per n-gram size, so no text makes look-ups slow. The most recent occurrence
    counts, because text that is copied or listed is usually near. A copy that reaches the end of the text continues in
    itself, so a short loop fills a whole draft. vLLM takes the earliest occurrence; that also gives long drafts in
    loops, but of what came first.
    """

    def __init__(self, sizes: LookupSizes) -> None:
        self._sizes = sizes
        self._ends: dict[tuple[int, ...], int] = {}
        # N-grams in this many tokens are indexed. The last n-gram of the text is not, or it would find itself.
        self._indexed = 0

    def propose(self, tokens: Sequence[int], max_drafts: int) -> tuple[int, ...]:
        """Return up to `max_drafts` tokens that may follow `tokens`, which must only have grown since the last call."""
        last = len(tokens)
        self._index(tokens, min(last - 1, self._indexed + TOKENS_PER_CALL))
        if self._indexed < last - 1:
            return ()
        for size in range(min(self._sizes.longest, last), self._sizes.shortest - 1, -1):
            follows = self._ends.get(tuple(tokens[last - size :]))
            if follows is not None:
                period = last - follows
                return tuple([tokens[follows + i % period] for i in range(max_drafts)])
        return ()

    def _index(self, tokens: Sequence[int], end: int) -> None:
        """Index the n-grams that end at or before `end`; later ones replace earlier ones."""
        for size in range(self._sizes.shortest, self._sizes.longest + 1):
            first = max(0, self._indexed + 1 - size)
            part = tokens[first:end]
            grams = zip(*[part[i:] for i in range(size)], strict=False)
            self._ends.update(zip(grams, range(first + size, end + 1), strict=False))
        self._indexed = max(self._indexed, end)
