"""A picture of tokens shows each with its text, its id and what it is marked as."""

from __future__ import annotations

from tests.notebook.stepping import words
from tests.notebook.test_pictures import texts
from trio_llm.notebook.tokens import draw_tokens


def test_every_token_has_text_and_id() -> None:
    """Text and id stand in the box, the position and the mark in its hover text."""
    picture = draw_tokens([7, 8, 9], words, "Three", marks=["read", "", "written"])
    assert {"w7", "7", "w9", "9", "read", "written"} <= set(texts(picture, "text"))
    assert texts(picture, "title") == ["position 0: 7 'w7' read", "position 1: 8 'w8' ", "position 2: 9 'w9' written"]


def test_rows_are_blocks() -> None:
    """With a number of tokens to a row, every row is named."""
    shown = texts(draw_tokens(list(range(40)), words, row_tokens=16), "text")
    assert [one for one in shown if one.startswith("block ")] == ["block 0", "block 1", "block 2"]


def test_white_space_is_seen() -> None:
    """A space and a line break are visible, and markup is text."""
    shown = texts(draw_tokens([1, 2], lambda ids: {1: " a\n", 2: "<b>"}[ids[0]]), "text")
    assert "␣a↵" in shown and "<b>" in shown
