"""Rate limits: a bucket of requests and a bucket of tokens for each key or peer.

A request takes one from the first bucket before anything else. Its token count is known at its end, so the second
bucket is charged then and may go below zero; further requests are refused until it is above zero again. Lines of
batches wait instead.
"""

from __future__ import annotations

from collections.abc import Callable

from trio_llm.config import AuthConfig
from trio_llm.server.access.token_buckets import RateLimiter, Verdict
from trio_llm.server.errors import HttpError, retry_after
from trio_llm.server.http.edge import Lifetime


class RateLimits:
    """The buckets of all callers. `clock` gives seconds."""

    def __init__(self, config: AuthConfig, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.configure(config)

    def configure(self, config: AuthConfig) -> None:
        """Begin with full buckets of the configured sizes."""

        def limiter(capacity: int) -> RateLimiter | None:
            return RateLimiter(capacity, config.rate_limit_window_secs, self._clock) if capacity else None

        self._requests = limiter(config.rate_limit_requests)
        self._tokens = limiter(config.rate_limit_tokens)

    def admit(self, name: str, lifetime: Lifetime, headers: dict[str, str]) -> None:
        """Count a request, write the rate limit headers, and charge its tokens at its end.

        Raises:
            HttpError: 429, a bucket is empty; the other one is unchanged.
        """
        tokens = self._tokens.look(name) if self._tokens is not None else None
        if self._tokens is not None and tokens is not None:
            headers.update(_rate_headers(self._tokens, tokens, "tokens"))
            if not tokens.allowed:
                raise _refusal(tokens, f"Too many tokens: at most {self._tokens.capacity} in a window.")
            lifetime.stack.callback(lambda: self.charge(name, sum(lifetime.num_tokens)))
        if self._requests is not None:
            verdict = self._requests.take(name)
            headers.update(_rate_headers(self._requests, verdict, "requests"))
            if not verdict.allowed:
                raise _refusal(verdict, f"Too many requests: at most {self._requests.capacity} at once.")

    def charge(self, name: str, num_tokens: int) -> None:
        """Charge spent tokens."""
        if self._tokens is not None:
            self._tokens.charge(name, num_tokens)

    def wait_s(self, name: str) -> float:
        """Return the seconds until tokens may be spent; 0 if they may now."""
        return 0.0 if self._tokens is None else self._tokens.look(name).retry_after_s


def _rate_headers(limiter: RateLimiter, verdict: Verdict, what: str) -> dict[str, str]:
    return {
        f"x-ratelimit-limit-{what}": str(limiter.capacity),
        f"x-ratelimit-remaining-{what}": str(verdict.remaining),
        f"x-ratelimit-reset-{what}": f"{verdict.reset_after_s:.3f}s",
    }


def _refusal(verdict: Verdict, message: str) -> HttpError:
    return HttpError(429, message, code="rate_limit_exceeded", headers=retry_after(verdict.retry_after_s))
