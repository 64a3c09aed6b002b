"""Prompt lookup against a search of the whole text, and its cost."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_llm.core.prompt_lookup import TOKENS_PER_CALL, LookupSizes, PromptLookup


def searched(tokens: Sequence[int], sizes: LookupSizes, most: int) -> tuple[int, ...]:
    """Propose by looking everywhere: the longest n-gram first, its most recent place first, copied token by token."""
    for size in range(sizes.longest, sizes.shortest - 1, -1):
        for end in range(len(tokens) - 1, size - 1, -1):
            if tokens[end - size : end] == tokens[len(tokens) - size :]:
                text = list(tokens)
                for at in range(end, end + most):
                    text.append(text[at])
                return tuple(text[len(tokens) :])
    return ()


@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=40),
    st.integers(1, 39),
    st.integers(1, 3),
    st.integers(0, 3),
    st.integers(1, 9),
)
def test_a_growing_text_gets_the_drafts_of_a_search(
    tokens: list[int], first: int, shortest: int, more: int, most: int
) -> None:
    """Whether asked after every token or first in the middle, it finds what a search of the whole text finds."""
    sizes = LookupSizes(shortest, shortest + more)
    lookup = PromptLookup(sizes)
    for length in range(min(first, len(tokens)), len(tokens) + 1):
        assert lookup.propose(tokens[:length], most) == searched(tokens[:length], sizes, most)


@pytest.mark.parametrize(
    ("tokens", "draft"),
    [
        ([1, 2, 3, 4, 9, 1, 2], (3, 4, 9, 1, 2, 3)),
        ([7, 7, 7], (7, 7, 7, 7, 7, 7)),
        ([1, 2, 5, 1, 2, 6, 1, 2], (6, 1, 2, 6, 1, 2)),
        ([9, 1, 2, 5, 8, 1, 2, 6, 9, 1, 2], (5, 8, 1, 2, 6, 9)),
        ([1, 2, 3], ()),
    ],
    ids=["copy", "loop", "most recent", "longest before most recent", "nothing new"],
)
def test_what_followed_the_same_words_is_the_draft(tokens: list[int], draft: tuple[int, ...]) -> None:
    """The longest n-gram counts, then the most recent, and a copy that reaches the end goes on in itself."""
    assert PromptLookup(LookupSizes(2, 3)).propose(tokens, 6) == draft


def test_what_was_split_between_two_calls_is_found() -> None:
    """A text that is asked about after every token has no n-gram that one call saw whole."""
    tokens, lookup = [1, 2, 3, 1, 2], PromptLookup(LookupSizes(2, 3))
    assert [lookup.propose(tokens[:length], 1) for length in range(1, 6)] == [(), (), (), (), (3,)]


def test_a_long_prompt_is_indexed_over_several_calls() -> None:
    """One call looks at a bounded number of tokens; until it has caught up it proposes nothing."""
    tokens = [at % 97 for at in range(2 * TOKENS_PER_CALL + 5)]
    lookup = PromptLookup(LookupSizes(2, 3))
    assert [len(lookup.propose(tokens, 4)) for _ in range(4)] == [0, 0, 4, 4]
