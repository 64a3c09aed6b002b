"""Token buckets: even refill, bounded memory, no time of their own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_llm.server.access import token_buckets as rate_limit
from trio_llm.server.access.token_buckets import RateLimiter


class Clock:
    """A clock that the test turns."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@given(
    st.integers(1, 20),
    st.floats(0.5, 100),
    st.lists(st.floats(0, 50), min_size=1, max_size=60),
)
def test_no_more_than_the_bucket_and_its_refill(capacity: int, window_s: float, waits: list[float]) -> None:
    """Whenever requests come, no more pass than the capacity plus what time has refilled; the count told is true."""
    clock = Clock()
    limiter = RateLimiter(capacity, window_s, clock)
    passed = 0
    for wait in waits:
        clock.now_s += wait
        verdict = limiter.take("a")
        passed += verdict.allowed
        assert passed <= capacity * (1 + clock.now_s / window_s) + 1e-6
        assert 0 <= verdict.remaining < capacity
        assert verdict.allowed or verdict.retry_after_s > 0


@given(st.integers(1, 20), st.floats(0.5, 100))
def test_the_time_to_wait_suffices(capacity: int, window_s: float) -> None:
    """Who waits as long as told passes, and who waits until the reset has a full bucket."""
    clock = Clock()
    limiter = RateLimiter(capacity, window_s, clock)
    while (verdict := limiter.take("a")).allowed:
        pass
    clock.now_s += verdict.retry_after_s * (1 + 1e-9)
    verdict = limiter.take("a")
    assert verdict.allowed
    clock.now_s += verdict.reset_after_s * (1 + 1e-9)
    assert limiter.take("a").remaining == capacity - 1


def test_a_clock_that_stands_still_refills_nothing() -> None:
    """Without time passing, a bucket gives its capacity and then nothing."""
    limiter = RateLimiter(3, 60, lambda: 5.0)
    assert [limiter.take("a").allowed for _ in range(5)] == [True, True, True, False, False]


def test_made_up_names_cost_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many names the last ones are remembered: a name that keeps coming is never forgotten, others are."""
    monkeypatch.setattr(rate_limit, "_MAX_BUCKETS", 10)
    limiter = RateLimiter(2, 60, lambda: 0.0)
    assert limiter.take("steady").allowed
    verdicts: list[bool] = []
    for number in range(100):
        limiter.take(f"made-up-{number}")
        verdicts.append(limiter.take("steady").allowed)
    assert verdicts == [True] + [False] * 99
    assert len(limiter._buckets) == 10
