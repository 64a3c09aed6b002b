"""Detects outputs that repeat a pattern, one token at a time."""

from __future__ import annotations

from trio_llm.params import RepetitionDetection


class RepetitionDetector:
    """Detects that the last tokens are one pattern, repeated `min_count` times.

    Tokens have period p if each equals the one p tokens before it. For every p, the detector counts how many of the
    last tokens have it. So a token costs one comparison per pattern size, whatever the number of repetitions.
    """

    def __init__(self, detection: RepetitionDetection) -> None:
        self._repeats = detection.min_count - 1
        self._first = max(detection.min_pattern_size, 1)
        self._recent: list[int] = []  # The last max_pattern_size tokens, the newest first.
        self._equal = [0] * (detection.max_pattern_size + 1 - self._first)

    def add(self, token_id: int) -> bool:
        """Add the next token; return whether the output now ends in a repeated pattern."""
        found = False
        first, recent, equal = self._first, self._recent, self._equal
        for at, size in enumerate(range(first, first + len(equal))):
            same = size <= len(recent) and recent[size - 1] == token_id
            equal[at] = equal[at] + 1 if same else 0
            found = found or equal[at] >= size * self._repeats
        recent.insert(0, token_id)
        del recent[first + len(equal) - 1 :]
        return found
