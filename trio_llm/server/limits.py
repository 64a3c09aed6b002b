"""How often and how much a caller may ask: a bucket of requests and one of tokens for each key or peer.

A request takes one from the first before anything else happens. What it costs in tokens is known when it is over, so
the second is charged then and may go below zero; the next request waits until it is above again. So do the lines of
batches, which were accepted when the batch was.
"""

from __future__ import annotations

from collections.abc import Callable

from trio_llm.config import AuthConfig
from trio_llm.server.edge import Lifetime
from trio_llm.server.errors import HttpError, retry_after
from trio_llm.server.rate_limit import RateLimiter, Verdict


class Limits:
    """The buckets of all callers. `clock` gives seconds."""

    def __init__(self, config: AuthConfig, clock: Callable[[], float]) -> None:
        def limiter(capacity: int) -> RateLimiter | None:
            return RateLimiter(capacity, config.rate_limit_window_secs, clock) if capacity else None

        self._requests = limiter(config.rate_limit_requests)
        self._tokens = limiter(config.rate_limit_tokens)

    def admit(self, name: str, lifetime: Lifetime, headers: dict[str, str]) -> None:
        """Count a request, write where its caller stands into `headers`, and charge its tokens when it is over.

        Raises:
            HttpError: 429, a bucket is empty; nothing was taken from the other one.
        """
        tokens = self._tokens.look(name) if self._tokens is not None else None
        if self._tokens is not None and tokens is not None:
            headers.update(_told(self._tokens, tokens, "tokens"))
            if not tokens.allowed:
                raise _refusal(tokens, f"Too many tokens: at most {self._tokens.capacity} in a window.")
            lifetime.stack.callback(lambda: self.charge(name, sum(lifetime.num_tokens)))
        if self._requests is not None:
            verdict = self._requests.take(name)
            headers.update(_told(self._requests, verdict, "requests"))
            if not verdict.allowed:
                raise _refusal(verdict, f"Too many requests: at most {self._requests.capacity} at once.")

    def charge(self, name: str, num_tokens: int) -> None:
        """Take tokens that were spent."""
        if self._tokens is not None:
            self._tokens.charge(name, num_tokens)

    def wait_s(self, name: str) -> float:
        """Return how long nothing may be spent, in seconds; 0 if something may."""
        return 0.0 if self._tokens is None else self._tokens.look(name).retry_after_s


def _told(limiter: RateLimiter, verdict: Verdict, what: str) -> dict[str, str]:
    return {
        f"x-ratelimit-limit-{what}": str(limiter.capacity),
        f"x-ratelimit-remaining-{what}": str(verdict.remaining),
        f"x-ratelimit-reset-{what}": f"{verdict.reset_after_s:.3f}s",
    }


def _refusal(verdict: Verdict, message: str) -> HttpError:
    return HttpError(429, message, code="rate_limit_exceeded", headers=retry_after(verdict.retry_after_s))
