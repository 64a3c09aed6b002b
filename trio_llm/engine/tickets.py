"""Admission: a request holds a ticket from its submission until the scheduler has removed it."""

from __future__ import annotations

import trio

from trio_llm.errors import OverloadedError


class Tickets:
    """A fixed number of tickets. A request that finds none is refused at once; none waits for a ticket."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_use = 0
        self._all_returned = trio.Event()
        self._all_returned.set()

    def take(self) -> None:
        """Take a ticket. Raises OverloadedError if none is left."""
        if self.in_use == self.limit:
            raise OverloadedError(f"All {self.limit} places for requests are taken. Retry later.")
        if self.in_use == 0:
            self._all_returned = trio.Event()
        self.in_use += 1

    def give_back(self, count: int) -> None:
        self.in_use -= count
        assert self.in_use >= 0
        if self.in_use == 0:
            self._all_returned.set()

    async def wait_all_returned(self) -> None:
        await self._all_returned.wait()
