"""Finds stop strings across token boundaries; holds back only text that may still become one."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Matches text that arrives in pieces against a few strings.

    The match that is complete first wins, however the text is split; of several at once, the longest wins. One
    automaton per string (Knuth, Morris, Pratt 1977) makes the cost per character constant, even for hostile strings.

    Args:
        stop: The strings; none is empty.
        include: Also emit the matched string.
    """

    def __init__(self, stop: Sequence[str], *, include: bool = False) -> None:
        assert all(stop)
        self._include = include
        self._patterns = [(string, _failure_table(string)) for string in sorted(stop, key=len, reverse=True)]
        self._states = [0] * len(self._patterns)
        self._held = ""

    def add(self, text: str, *, may_end: bool = True) -> tuple[str, str | None]:
        """Add text; return the text to emit and the stop string that was found, after which nothing may be added.

        With `may_end` false, no stop string ends here, but one may begin here and be completed by later text.
        """
        buffer = self._held + text
        for end, character in enumerate(text, start=len(self._held) + 1):
            for index, (pattern, failure) in enumerate(self._patterns):
                state = self._states[index]
                while state and pattern[state] != character:
                    state = failure[state - 1]
                state += pattern[state] == character
                if state == len(pattern) and not may_end:
                    state = failure[state - 1]
                if state == len(pattern):
                    self._held = ""
                    return buffer[: end if self._include else end - state], pattern
                self._states[index] = state
        emitted = len(buffer) - max(self._states, default=0)
        self._held = buffer[emitted:]
        return buffer[:emitted], None

    def finish(self) -> str:
        """Return the text held back, which is not a stop string because no more text follows."""
        held, self._held = self._held, ""
        return held


def _failure_table(pattern: str) -> list[int]:
    """Return for each prefix the length of its longest proper suffix that is also a prefix."""
    table = [0] * len(pattern)
    state = 0
    for at in range(1, len(pattern)):
        while state and pattern[state] != pattern[at]:
            state = table[state - 1]
        state += pattern[state] == pattern[at]
        table[at] = state
    return table
