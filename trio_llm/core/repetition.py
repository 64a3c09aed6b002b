"""Outputs that go in circles, found a token at a time."""

from __future__ import annotations

from trio_llm.messages import RepetitionDetection


class RepetitionDetector:
    """Says when the last tokens are one pattern, so many times in a row.

    The last tokens have period p where each equals the one p before it. So many of the last tokens are counted for
    every p, which makes the cost of a token its number of pattern sizes, however often the pattern has to come.
    """

    def __init__(self, wanted: RepetitionDetection) -> None:
        self._repeats = wanted.min_count - 1
        self._first = max(wanted.min_pattern_size, 1)
        self._recent: list[int] = []  # The last max_pattern_size tokens, the newest first.
        self._equal = [0] * (wanted.max_pattern_size + 1 - self._first)

    def add(self, token_id: int) -> bool:
        """Take the next token; return whether the output now ends in such a pattern."""
        found = False
        first, recent, equal = self._first, self._recent, self._equal
        for at, size in enumerate(range(first, first + len(equal))):
            same = size <= len(recent) and recent[size - 1] == token_id
            equal[at] = equal[at] + 1 if same else 0
            found = found or equal[at] >= size * self._repeats
        recent.insert(0, token_id)
        del recent[first + len(equal) - 1 :]
        return found
