"""The deadline of a request."""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import contextmanager

import attrs
import trio

from trio_llm.server.bodies.size_limits import flag_of
from trio_llm.server.errors import HttpError


@attrs.frozen
class Deadline:
    """A time on Trio's clock; the default is never.

    Attributes:
        timeout_s: Seconds from the request's start to the deadline.
    """

    at_s: float = math.inf
    timeout_s: float = math.inf

    @classmethod
    def after(cls, began_s: float, timeout_s: float) -> Deadline:
        """Return the deadline of a request that began at `began_s`; a timeout of 0 means none."""
        return cls(began_s + timeout_s, timeout_s) if timeout_s else cls()

    @contextmanager
    def enforced(self) -> Generator[None]:
        """Cancel the block at the deadline.

        Raises:
            HttpError: 504, the block was cancelled. Clients must not retry: it would time out again.
        """
        with trio.CancelScope(deadline=self.at_s) as scope:
            yield
        if scope.cancelled_caught:
            raise self.error()

    def error(self) -> HttpError:
        """Return the error of a request whose deadline has passed."""
        message = f"The request took longer than {self.timeout_s:g} s ({flag_of('request_timeout_s')})."
        return HttpError(504, message, code="request_timeout", headers={"x-should-retry": "false"})
