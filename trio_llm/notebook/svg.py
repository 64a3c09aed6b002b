"""Building blocks of the pictures: the picture itself, shapes, and colours for light and dark pages."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path

import attrs

# Mid tones: white text reads on them, and they stand out on a light and on a dark card.
PALETTE = ("#3b7dd8", "#d07a1f", "#2a9564", "#8e63ce", "#cf4f87", "#17909f", "#7f8c1a", "#a0673c")
TEXT_WIDTH_RATIO = 0.54
"""Approximate width of a letter divided by the font size; only used to leave room."""

_LIGHT = "--ink:#1f2328;--muted:#626a73;--card:#ffffff;--line:#cfd6dd;--soft:#eef1f4;--alarm:#c93c37"
_DARK = "--ink:#e6edf3;--muted:#9aa4af;--card:#161b22;--line:#434b55;--soft:#252c35;--alarm:#ff7b72"
_STYLE = (
    f".tl{{{_LIGHT};font-family:system-ui,-apple-system,'Segoe UI',sans-serif;font-size:12px;max-width:100%;"
    "height:auto}"
    f"@media (prefers-color-scheme:dark){{.tl{{{_DARK}}}}}"
    f"[data-jp-theme-light='true'] .tl,.vscode-light .tl{{{_LIGHT}}}"
    f"[data-jp-theme-light='false'] .tl,.vscode-dark .tl{{{_DARK}}}"
    ".tl text{fill:var(--ink)}.tl .muted{fill:var(--muted)}.tl .on{fill:#fff}.tl .mono{font-family:ui-monospace,Menlo,"
    "Consolas,monospace}.tl .title{font-size:13px;font-weight:600}.tl .card{fill:var(--card);stroke:var(--line)}"
    ".tl .empty{fill:none;stroke:var(--line)}.tl .soft{fill:var(--soft);stroke:var(--line)}"
    ".tl .dash{fill:var(--soft);stroke:var(--muted);stroke-dasharray:3 2}.tl .ring{fill:none;stroke:var(--ink);"
    "stroke-width:2}.tl .alarm{fill:none;stroke:var(--alarm);stroke-width:1.5}.tl .alarm-text{fill:var(--alarm)}"
    ".tl .rule{stroke:var(--line)}.tl .limit{stroke:var(--alarm);stroke-width:1.5;stroke-dasharray:5 3}"
)


@attrs.frozen(repr=False)
class Picture:
    """An SVG that a notebook shows, and that `save`d stands alone.

    Attributes:
        title: What a screen reader says.
        body: SVG elements.
    """

    title: str
    width: float
    height: float
    body: str

    def __repr__(self) -> str:
        return f"<Picture: {self.title}>"

    def _repr_svg_(self) -> str:
        w, h = round(self.width), round(self.height)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" class="tl" role="img" aria-label="{escape(self.title)}" '
            f'width="{w}" height="{h}" viewBox="0 0 {w} {h}"><style>{_STYLE}</style>'
            f'<rect class="card" x="0.5" y="0.5" width="{w - 1}" height="{h - 1}" rx="8"/>{self.body}</svg>'
        )

    def _repr_html_(self) -> str:
        """Return the same SVG: inside the page its hover texts work, as an image they do not."""
        return self._repr_svg_()

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self._repr_svg_(), encoding="utf-8")


def colour(request_id: int) -> str:
    """Return a request's colour, the same in every picture."""
    return PALETTE[request_id % len(PALETTE)]


def text(x: float, y: float, content: str, css: str = "", *, size: float | None = None, anchor: str = "start") -> str:
    """Write one line with its baseline at `y`."""
    font = f' font-size="{size}"' if size else ""
    place = f'x="{x:g}" y="{y:g}" text-anchor="{anchor}"'
    return f'<text {place} class="{css}"{font} xml:space="preserve">{escape(content)}</text>'


def rect(
    x: float,
    y: float,
    width: float,
    height: float,
    *,
    css: str = "",
    fill: str = "",
    opacity: float = 1.0,
    radius: float = 4,
) -> str:
    """Draw a rounded rectangle, by CSS class or by colour."""
    look = f'class="{css}"' if css else f'fill="{fill}"'
    see_through = f' opacity="{opacity:g}"' if opacity < 1 else ""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}" {look}{see_through}/>'


def group(parts: Iterable[str], hover: str = "", opacity: float = 1.0) -> str:
    """Hold parts together under one hover text."""
    title = f"<title>{escape(hover)}</title>" if hover else ""
    faded = f' opacity="{opacity:g}"' if opacity < 1 else ""
    return f"<g{faded}>{title}{''.join(parts)}</g>"


def fit(content: str, width: float, size: float = 12) -> str:
    """Shorten a text to what fits into `width`."""
    room = max(1, int(width / (size * TEXT_WIDTH_RATIO)))
    return content if len(content) <= room else content[: room - 1] + "…"


def visible(content: str) -> str:
    """Make the white space of a token visible."""
    return content.replace("\n", "↵").replace("\t", "⇥")


def legend(x: float, y: float, entries: Iterable[tuple[str, str]]) -> tuple[str, float]:
    """Draw (shape drawn at the origin in 14 x 12, label) side by side; return it and where it ends."""
    parts: list[str] = []
    for shape, label in entries:
        parts.append(
            f'<g transform="translate({x:g} {y - 10:g})">{shape}</g>' + text(x + 19, y, label, "muted", size=11)
        )
        x += 19 + len(label) * 11 * TEXT_WIDTH_RATIO + 16
    return "".join(parts), x
