"""Charts that compare numbers: matplotlib draws them, in the colours of the other pictures on light and dark pages."""

from __future__ import annotations

import re
from io import StringIO
from typing import TYPE_CHECKING, Any

from trio_llm.notebook.svg import PALETTE, Picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# matplotlib knows no CSS variables. It draws in these colours, which nothing else has, and the page's take their place.
_INKS = {"#010203": "var(--ink)", "#010204": "var(--muted)", "#010205": "var(--line)"}
INK, MUTED, LINE = _INKS
ALARM = "#d1504a"
# What other pictures of the page would see, or what is long and says nothing.
_NOISE = (r"<metadata>.*?</metadata>", r"<style.*?</style>", r' id="[A-Za-z0-9.]+_\d+"', r"\n(?=<)")
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}


def new_chart(*titles: str, x: str = "", y: str = "", size: tuple[float, float] = (7.6, 3.0)) -> list[Axes]:
    """Return empty axes side by side, one for each title. Fill them as usual, then show `picture(axes)`.

    Args:
        titles: What each chart says, in a few words.
        x, y: What the axes count, with the unit; `y` stands on the first one.
        size: Width and height of all together, in inches.
    """
    from cycler import cycler
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({**_STYLE, "axes.prop_cycle": cycler(color=PALETTE)}):
        figure = Figure(figsize=size, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)  # type: ignore[union-attr]
        axes = figure.subplots(1, len(titles), squeeze=False)[0].tolist()
        for one, title in zip(axes, titles, strict=True):
            one.set(title=title, xlabel=x)
        axes[0].set_ylabel(y)
    return axes


def picture(axes: list[Axes]) -> Picture:
    """Return the chart as a picture; its texts are texts, and it follows the colours of the page."""
    from matplotlib import rc_context

    figure: Any = axes[0].figure
    titles = "; ".join(one.get_title("left") for one in axes)
    for one in axes:
        if (legend := one.get_legend()) is not None:
            legend.set_frame_on(False)
    file = StringIO()
    with rc_context({**_STYLE, "svg.hashsalt": titles}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    for colour, name in _INKS.items():
        svg = svg.replace(colour, name)
    head = re.search(r'<svg [^>]*viewBox="0 0 ([\d.]+) ([\d.]+)"[^>]*>', svg)
    assert head is not None
    width, height = float(head[1]), float(head[2])
    body = svg[head.end() : svg.rindex("</svg>")].replace("xlink:href", "href")
    for noise in _NOISE:
        body = re.sub(noise, "", body, flags=re.DOTALL)
    body = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", body)
    # Points to pixels.
    body = f'<g transform="scale({4 / 3:.4f})" stroke-linejoin="round">{body}</g>'
    return Picture(titles, width * 4 / 3, height * 4 / 3, body)
