"""Stop strings, found across token borders, with no more text held back than may still become one."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Matches text that arrives in pieces against a few strings.

    The match that is complete first wins, whatever the pieces; of several complete at once, the longest. One automaton
    (Knuth, Morris, Pratt 1977) per string makes the cost per character constant, also for hostile strings.

    Args:
        stop: The strings, none of them empty.
        include: Emit the matched string too.
    """

    def __init__(self, stop: Sequence[str], *, include: bool = False) -> None:
        assert all(stop)
        self._include = include
        self._patterns = [(string, _failure_table(string)) for string in sorted(stop, key=len, reverse=True)]
        self._states = [0] * len(self._patterns)
        self._held = ""

    def add(self, text: str, *, may_end: bool = True) -> tuple[str, str | None]:
        """Take more text; return what may be shown and the stop string that ended it, after which nothing is added.

        Text that may not end it can still begin a stop string that later text completes.
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
        shown = len(buffer) - max(self._states, default=0)
        self._held = buffer[shown:]
        return buffer[:shown], None

    def finish(self) -> str:
        """Return what was held back: no more text comes, so it was no stop string."""
        held, self._held = self._held, ""
        return held


def _failure_table(pattern: str) -> list[int]:
    """Return for each prefix the length of its longest proper suffix that is a prefix too."""
    table = [0] * len(pattern)
    state = 0
    for at in range(1, len(pattern)):
        while state and pattern[state] != pattern[at]:
            state = table[state - 1]
        state += pattern[state] == pattern[at]
        table[at] = state
    return table
