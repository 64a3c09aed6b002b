"""Token buckets by name, with an injected clock and a bound on the number of buckets."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import attrs

_MAX_BUCKETS = 10_000


@attrs.frozen
class Verdict:
    """The result of a check of a bucket.

    Attributes:
        remaining: Requests that may follow at once.
        retry_after_s: Seconds until the next one is allowed; 0 if it is now.
        reset_after_s: Seconds until the bucket is full.
    """

    allowed: bool
    remaining: int
    retry_after_s: float
    reset_after_s: float


@attrs.define
class _Bucket:
    tokens: float
    filled_at_s: float


class RateLimiter:
    """At most `capacity` requests at once, refilled evenly over `window_s`.

    The least recently seen buckets are forgotten first; a forgotten one comes back full, which lets through at most
    what a fresh name would get anyway.
    """

    def __init__(self, capacity: int, window_s: float, clock: Callable[[], float]) -> None:
        self.capacity = capacity
        self._rate = capacity / window_s
        self._clock = clock
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()

    def take(self, name: str) -> Verdict:
        """Take one token from a bucket, if it has one."""
        bucket = self._filled(name)
        allowed = bucket.tokens >= 1
        bucket.tokens -= allowed
        return self._verdict(bucket, allowed=allowed)

    def look(self, name: str) -> Verdict:
        """Check whether a bucket has a token without taking it."""
        bucket = self._filled(name)
        return self._verdict(bucket, allowed=bucket.tokens >= 1)

    def charge(self, name: str, amount: int) -> None:
        """Take `amount` from a bucket, even below zero, for work that is already done."""
        self._filled(name).tokens -= amount

    def _filled(self, name: str) -> _Bucket:
        now = self._clock()
        bucket = self._buckets.setdefault(name, _Bucket(self.capacity, now))
        self._buckets.move_to_end(name)
        if len(self._buckets) > _MAX_BUCKETS:
            self._buckets.popitem(last=False)
        bucket.tokens = min(self.capacity, bucket.tokens + (now - bucket.filled_at_s) * self._rate)
        bucket.filled_at_s = now
        return bucket

    def _verdict(self, bucket: _Bucket, *, allowed: bool) -> Verdict:
        return Verdict(
            allowed=allowed,
            remaining=max(0, int(bucket.tokens)),
            retry_after_s=max(0.0, 1 - bucket.tokens) / self._rate,
            reset_after_s=(self.capacity - bucket.tokens) / self._rate,
        )
