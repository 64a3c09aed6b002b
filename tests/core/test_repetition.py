"""Outputs that go in circles: the detector says so with the very token that completes the last repetition."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from trio_llm.core.repetition import RepetitionDetector
from trio_llm.params import RepetitionDetection


def ends_in_circles(tokens: list[int], wanted: RepetitionDetection) -> bool:
    """Say by looking at all of it whether an output ends in a pattern that came often enough."""
    for size in range(wanted.min_pattern_size, wanted.max_pattern_size + 1):
        if len(tokens) >= size * wanted.min_count:
            pattern, end = tokens[-size:], tokens[-size * wanted.min_count :]
            if end == pattern * wanted.min_count:
                return True
    return False


@given(st.lists(st.integers(0, 2), max_size=40), st.integers(1, 4), st.integers(0, 3), st.integers(2, 4))
def test_it_is_found_with_the_token_that_completes_it(
    tokens: list[int], smallest: int, further: int, min_count: int
) -> None:
    """Token by token, the detector says what a look at the whole output says."""
    wanted = RepetitionDetection(max_pattern_size=smallest + further, min_count=min_count, min_pattern_size=smallest)
    detector = RepetitionDetector(wanted)
    found = [detector.add(token) for token in tokens]
    assert found == [ends_in_circles(tokens[: end + 1], wanted) for end in range(len(tokens))]


def test_smaller_patterns_count_only_as_asked() -> None:
    """One token over and over is a pattern of two as well, but not one of two tokens in a row that came only once."""
    detector = RepetitionDetector(RepetitionDetection(max_pattern_size=2, min_count=2, min_pattern_size=2))
    assert [detector.add(token) for token in (5, 5, 5, 5)] == [False, False, False, True]
