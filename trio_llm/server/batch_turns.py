"""Whose line is next: owners take turns, and so do the batches of each. Pure: no clock, no tasks."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Generic, TypeVar

B = TypeVar("B")


class Turns(Generic[B]):
    """The batches that have lines left, by owner.

    An owner's share does not grow with the number of its batches, nor a batch's with the number of its lines.
    """

    def __init__(self) -> None:
        # Both orders are "longest ago first".
        self._owners: OrderedDict[str, deque[B]] = OrderedDict()

    @property
    def owners(self) -> tuple[str, ...]:
        return tuple(self._owners)

    def add(self, owner: str, batch: B) -> None:
        self._owners.setdefault(owner, deque()).append(batch)

    def remove(self, owner: str, batch: B) -> None:
        """Take a batch out; nothing happens where it is out already."""
        batches = self._owners.get(owner, deque[B]())
        if batch in batches:
            batches.remove(batch)
        if not batches:
            self._owners.pop(owner, None)

    def next(self, may_go: Callable[[str], bool]) -> B | None:
        """Return the batch whose turn it is among those of owners that may go, and put it last."""
        for owner, batches in self._owners.items():
            if may_go(owner):
                self._owners.move_to_end(owner)
                batches.rotate(-1)
                return batches[-1]
        return None
