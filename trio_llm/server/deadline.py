"""When a request must have ended, whoever waits for it and however."""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import contextmanager

import attrs
import trio

from trio_llm.server.amounts import flag_of
from trio_llm.server.errors import HttpError


@attrs.frozen
class Deadline:
    """A moment of Trio's clock; the default never comes.

    Attributes:
        timeout_s: How long after its beginning a request has to end by then.
    """

    at_s: float = math.inf
    timeout_s: float = math.inf

    @classmethod
    def after(cls, began_s: float, timeout_s: float) -> Deadline:
        """Return the deadline of a request that began then; a timeout of 0 is none."""
        return cls(began_s + timeout_s, timeout_s) if timeout_s else cls()

    @contextmanager
    def kept(self) -> Generator[None]:
        """Cancel the block at the deadline.

        Raises:
            HttpError: 504, it was cancelled. Clients must not retry: what took too long would take too long again.
        """
        with trio.CancelScope(deadline=self.at_s) as scope:
            yield
        if scope.cancelled_caught:
            message = f"The request took longer than {self.timeout_s:g} s ({flag_of('request_timeout_s')})."
            raise HttpError(504, message, code="request_timeout", headers={"x-should-retry": "false"})
