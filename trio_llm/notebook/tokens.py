"""A text as its tokens: each in a box, its text above its id."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from trio_llm.notebook.svg import PALETTE, Picture, group, legend, rect, text, visible

_MARGIN, _WIDEST, _HIGH, _GAP = 16, 860, 36, 4
_LETTER = 6.7


def draw_tokens(
    token_ids: Sequence[int],
    decode: Callable[[Sequence[int]], str],
    title: str = "Tokens",
    *,
    marks: Sequence[str] = (),
    row_tokens: int | None = None,
    rows: str = "block",
) -> Picture:
    """Draw tokens in reading order.

    Args:
        decode: Turns ids into text.
        marks: A word for each token, shown as its colour; "" for none.
        row_tokens: Tokens in a row, whose name stands before it; None for as many as fit.
        rows: Name of such a row.
    """
    left = _MARGIN + (64 if row_tokens else 0)
    colours = {mark: PALETTE[at % len(PALETTE)] for at, mark in enumerate(dict.fromkeys(filter(None, marks)))}
    parts = [text(_MARGIN, 26, title, "title")]
    x, y, right = float(left), 40.0, 0.0
    for at, token_id in enumerate(token_ids):
        shown = visible(decode([token_id])).replace(" ", "␣") or "∅"
        wide = max(len(shown) * _LETTER, len(str(token_id)) * 5.6) + 10
        new_row = at % row_tokens == 0 if row_tokens else x + wide > _WIDEST
        if new_row and at:
            x, y = left, y + _HIGH + 6
        if new_row and row_tokens:
            parts.append(text(_MARGIN, y + 22, f"{rows} {at // row_tokens}", "muted", size=11))
        mark = marks[at] if marks else ""
        parts.append(
            _box(x, y, wide, shown, token_id, f"position {at}: {token_id} {shown!r} {mark}", colours.get(mark))
        )
        x += wide + _GAP
        right = max(right, x)
    y += _HIGH
    if colours:
        y += 22
        shapes = [(rect(0, 0, 14, 12, fill=colour, opacity=0.45, radius=3), mark) for mark, colour in colours.items()]
        key, end = legend(_MARGIN, y, shapes)
        parts.append(key)
        right = max(right, end)
    return Picture(title, max(right + _MARGIN, _MARGIN * 2 + len(title) * 7.5), y + 14, "".join(parts))


def _box(x: float, y: float, wide: float, shown: str, token_id: int, hover: str, colour: str | None) -> str:
    parts = [rect(x, y, wide, _HIGH, css="soft")]
    if colour is not None:
        parts.append(rect(x, y, wide, _HIGH, fill=colour, opacity=0.45))
    parts.append(text(x + wide / 2, y + 15, shown, "mono", size=11, anchor="middle"))
    parts.append(text(x + wide / 2, y + 29, str(token_id), "muted", size=9, anchor="middle"))
    return group(parts, hover)
