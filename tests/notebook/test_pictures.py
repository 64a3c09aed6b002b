"""The pictures show what the block manager says: every block, its owners, and what a step changed."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from tests.notebook.stepping import Hand, words
from trio_llm.notebook.pictures import describe, draw_diff, draw_pool, draw_tables
from trio_llm.notebook.svg import Picture, colour, fit

SHARED = list(range(100, 132))


@pytest.fixture
def hand() -> Hand:
    """Two running requests that share two blocks, and one that ended and left two cached blocks."""
    hand = Hand()
    hand.submit(1, [*SHARED, 1, 2, 3], max_tokens=1)
    hand.run()
    hand.submit(2, [*SHARED, 4, 5])
    hand.submit(3, [*SHARED, 6, 7])
    hand.step()
    return hand


def texts(picture: Picture, tag: str) -> list[str]:
    """Return the content of all elements of one kind; raises where the SVG is not well-formed."""
    root = ET.fromstring(picture._repr_svg_())
    return [element.text or "" for element in root.iter(f"{{http://www.w3.org/2000/svg}}{tag}")]


def test_pool_shows_every_block_and_its_owners(hand: Hand) -> None:
    """There is one hover text per block, and it names all owners of a shared one."""
    hovers = texts(draw_pool(hand.blocks), "title")
    assert len(hovers) == 21
    shared = [hover for hover in hovers if "request 2 and request 3" in hover]
    assert len(shared) == 2
    assert hovers[0] == "block 0: null block, never written or read"


def test_pool_uses_the_colours_of_its_requests(hand: Hand) -> None:
    """Colours belong to requests; a request without blocks has none in the picture."""
    svg = draw_pool(hand.blocks)._repr_svg_()
    assert colour(2) in svg and colour(3) in svg and colour(1) not in svg
    assert {"request 2", "request 3"} <= set(texts(draw_pool(hand.blocks), "text"))


def test_diff_names_exactly_what_changed(hand: Hand) -> None:
    """The lines under a diff say what became of each block that changed, and of no other."""
    before = hand.blocks.blocks()
    hand.run()
    after = hand.blocks.blocks()
    changed = [
        new for old, new in zip(before, after, strict=True) if old.owners != new.owners or old.digest != new.digest
    ]
    lines = [line for line in texts(draw_diff(before, after), "text") if line.startswith("block ")]
    assert len(lines) == len(changed) > 0
    for line, state in zip(lines, changed, strict=True):
        assert line.startswith(f"block {state.block}: used by request ") and line.endswith(f" → {describe(state)}")


def test_diff_tells_when_a_block_becomes_known() -> None:
    """A block that its owner filled is said to be in the prefix cache now."""
    hand = Hand()
    hand.submit(1, list(range(16)))
    hand.step()
    before = hand.blocks.blocks()
    hand.step()
    lines = texts(draw_diff(before, hand.blocks.blocks()), "text")
    assert "block 1: full, now in the prefix cache too" in lines


def test_nothing_changed(hand: Hand) -> None:
    """Two equal states give a diff without lines."""
    states = hand.blocks.blocks()
    assert draw_diff(states, states).title == "What changed: 0 of 20 blocks changed"


def test_tables_show_where_tokens_lie(hand: Hand) -> None:
    """A block table names each physical block of a sequence and the tokens in it."""
    picture = draw_tables(hand.scheduler.running, hand.blocks, words)
    hovers = texts(picture, "title")
    (first, *_), (second, *_) = hand.blocks.tables(2)[0], hand.blocks.tables(3)[0]
    assert first == second
    assert sum(hover.startswith(f"block {first}: w100 w101") for hover in hovers) == 2


def test_texts_are_escaped() -> None:
    """A token that looks like markup is text in the picture, not markup."""
    hand = Hand()
    hand.submit(1, [1, 2, 3])
    hand.step()
    picture = draw_tables(hand.scheduler.running, hand.blocks, lambda ids: "<script>&" * len(ids))
    assert any("<script>&" in content for content in texts(picture, "title"))


def test_a_saved_picture_stands_alone(hand: Hand, tmp_path: Path) -> None:
    """What is saved is a whole SVG file, the same that a notebook shows."""
    picture = draw_pool(hand.blocks)
    picture.save(str(tmp_path / "pool.svg"))
    assert (tmp_path / "pool.svg").read_text(encoding="utf-8") == picture._repr_svg_() == picture._repr_html_()
    assert repr(picture).startswith("<Picture: KV block pool")


def test_long_texts_are_cut() -> None:
    """A text that does not fit ends in an ellipsis and fits."""
    assert fit("abcdef", 1000) == "abcdef"
    assert fit("abcdef", 24, size=10) == "abc…"
