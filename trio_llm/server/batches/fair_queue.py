"""The order of lines: owners take turns, and so do the batches of each owner. Pure: no clock, no tasks."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Generic, TypeVar

B = TypeVar("B")


class FairQueue(Generic[B]):
    """The batches with lines left, by owner.

    An owner's share does not depend on the number of its batches, nor a batch's share on the number of its lines.
    """

    def __init__(self) -> None:
        # Both are ordered by the last turn, longest ago first.
        self._owners: OrderedDict[str, deque[B]] = OrderedDict()

    @property
    def owners(self) -> tuple[str, ...]:
        return tuple(self._owners)

    def add(self, owner: str, batch: B) -> None:
        self._owners.setdefault(owner, deque()).append(batch)

    def remove(self, owner: str, batch: B) -> None:
        """Remove a batch. Removing it again does nothing."""
        batches = self._owners.get(owner, deque[B]())
        if batch in batches:
            batches.remove(batch)
        if not batches:
            self._owners.pop(owner, None)

    def next(self, may_go: Callable[[str], bool]) -> B | None:
        """Return the next batch of an owner that `may_go` allows, and move it to the end."""
        for owner, batches in self._owners.items():
            if may_go(owner):
                self._owners.move_to_end(owner)
                batches.rotate(-1)
                return batches[-1]
        return None
