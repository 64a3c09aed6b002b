"""Notice that ranks on GPUs do not answer: a collective waits in a GPU's queue, where nothing has a timeout.

Rank 0 begins a turn when it tells the others what to do, and ends it when all of its own part is queued. A turn that is
not over in time, on the host or on the GPU, waits for a rank that is stuck.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import attrs


class Mark(Protocol):
    """A point in a GPU's queue."""

    def has_passed(self) -> bool:
        """Return whether all work queued before it is done. Any thread may call this."""
        ...


@attrs.frozen
class _Turn:
    """When a turn began, and its end in the queue, once all of it is queued."""

    began_s: float
    end: Mark | None = None


class Silence:
    """The last turn of the ranks. One thread begins and ends turns, another one asks."""

    def __init__(self, mark: Callable[[], Mark], timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin without a turn.

        Args:
            mark: Returns the current end of the GPU's queue.
            timeout_s: Seconds that a turn may take. That of the step before may be part of them.
        """
        self._mark, self._timeout_s, self._clock = mark, timeout_s, clock
        self._turn: _Turn | None = None

    def begin(self) -> None:
        """Begin a turn, in place of the one before: the queue keeps their order."""
        self._turn = _Turn(self._clock())

    def end(self) -> None:
        """Note that all of a turn is queued."""
        assert self._turn is not None
        self._turn = attrs.evolve(self._turn, end=self._mark())

    def is_too_long(self) -> bool:
        """Return whether the turn should have been over."""
        turn = self._turn
        if turn is None or self._clock() - turn.began_s < self._timeout_s:
            return False
        return turn.end is None or not turn.end.has_passed()
