"""Prompt lookup: guess what comes next by what came after the same words before.

A proposer of drafts that needs no model: where the last few tokens stood earlier in the sequence, what followed them
there is the draft. It knows tokens only; whether a draft is right is found out by the model.

Source: Saxena 2023, "Prompt Lookup Decoding"; the copy that overlaps itself is that of Ziv and Lempel 1977.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs

# Tokens indexed in one call, half a millisecond: a long prompt is caught up with over several steps.
TOKENS_PER_CALL = 1024


@attrs.frozen
class LookupSizes:
    """Which n-grams are looked up: the longest of `longest` to `shortest` tokens that stood there before."""

    shortest: int
    longest: int

    def __attrs_post_init__(self) -> None:
        assert 1 <= self.shortest <= self.longest


class PromptLookup:
    """Where each n-gram of one growing sequence ended last.

    A token costs one dictionary entry per size, whatever stands in the text, so no text makes looking up slow. Of equal
    n-grams the most recent one counts: what is being copied or listed now is nearer than what was long ago. Where the
    copy reaches the end of the text it goes on in itself, so a loop of few tokens still fills a whole draft; taking
    the earliest occurrence instead, as vLLM does, gives long drafts in loops too, but of what was said first.
    """

    def __init__(self, sizes: LookupSizes) -> None:
        self._sizes = sizes
        self._ends: dict[tuple[int, ...], int] = {}
        # N-grams within so many tokens are known; the last one of the text is not, or it would find itself.
        self._indexed = 0

    def propose(self, tokens: Sequence[int], most: int) -> tuple[int, ...]:
        """Return up to `most` tokens that may follow `tokens`, which may only have grown since the last call."""
        last = len(tokens)
        self._index(tokens, min(last - 1, self._indexed + TOKENS_PER_CALL))
        if self._indexed < last - 1:
            return ()
        for size in range(min(self._sizes.longest, last), self._sizes.shortest - 1, -1):
            follows = self._ends.get(tuple(tokens[last - size :]))
            if follows is not None:
                period = last - follows
                return tuple([tokens[follows + i % period] for i in range(most)])
        return ()

    def _index(self, tokens: Sequence[int], end: int) -> None:
        """Note the n-grams that end at `end` or before; later ones take the place of earlier ones."""
        for size in range(self._sizes.shortest, self._sizes.longest + 1):
            first = max(0, self._indexed + 1 - size)
            part = tokens[first:end]
            grams = zip(*[part[i:] for i in range(size)], strict=False)
            self._ends.update(zip(grams, range(first + size, end + 1), strict=False))
        self._indexed = max(self._indexed, end)
