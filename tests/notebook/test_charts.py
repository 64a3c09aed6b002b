"""Charts are pictures like the others: their texts are texts, and their colours are those of the page."""

from __future__ import annotations

from tests.notebook.test_pictures import texts
from trio_llm.notebook.charts import new_chart, picture


def drawn() -> str:
    """Draw two charts."""
    left, right = new_chart("First", "Second", x="step", y="blocks")
    left.plot([1, 2], [3, 4], label="a line")
    left.legend()
    right.bar([1, 2], [3, 4])
    return picture([left, right])._repr_svg_()


def test_a_chart_is_well_formed_and_says_what_it_shows() -> None:
    """Titles, axes and the legend are text, and the file is XML by itself."""
    left, right = new_chart("First", "Second", x="step", y="blocks")
    left.plot([1, 2], [3, 4], label="a line")
    left.legend()
    shown = picture([left, right])
    assert {"First", "Second", "step", "blocks", "a line"} <= set(texts(shown, "text"))
    assert repr(shown) == "<Picture: First; Second>"


def test_a_chart_follows_the_page() -> None:
    """No colour of a text or an axis is fixed, and no style of matplotlib reaches the page around it."""
    svg = drawn()
    assert "#0102" not in svg and "#000000" not in svg
    assert "var(--ink)" in svg and "var(--muted)" in svg and "var(--line)" in svg
    assert svg.count("<style") == 1


def test_the_same_chart_is_the_same_file() -> None:
    """A notebook that is built again does not change where its numbers do not."""
    assert drawn() == drawn()
