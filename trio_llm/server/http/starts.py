"""How many requests begin in a pass of the event loop."""

from __future__ import annotations

import trio

from trio_llm.server.http.accept import AnswerProbe

# A request takes about a dozen passes and 1 ms: 4 a pass keep a pass to 4 ms. A guess between the two.
_STARTS_PER_PASS = 4
_PROBES = (b"GET /health ", b"GET /ready ", b"GET /ping ")


class Starts:
    """Starts a few requests in each pass of the event loop; probes do not wait.

    A burst of 500 requests is half a second of work. If all started at once, each pass would take one step of every
    request, and a request that arrives meanwhile needs a dozen passes.

    Attributes:
        answer_probe: Answers a probe on a connection that is kept alive.
    """

    def __init__(self, answer_probe: AnswerProbe = lambda _head, _peer: None) -> None:
        self.answer_probe = answer_probe
        self._turns = trio.Semaphore(_STARTS_PER_PASS)

    async def turn(self, head: bytes) -> None:
        """Wait until the request that begins with `head` may begin."""
        if not head.startswith(_PROBES):
            async with self._turns:
                await trio.lowlevel.checkpoint()
