"""Moves through a record by hand: a slider over its steps, with the pool and the messages of each."""

from __future__ import annotations

from html import escape
from typing import Any

import attrs

from trio_llm.notebook.pictures import draw_pool
from trio_llm.notebook.tables import grant_table, scheduler_table
from trio_llm.replay import Replay


@attrs.frozen(repr=False)
class StepView:
    """One step of a record, as it is shown."""

    text: str
    html: str

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return self.html


def view(replay: Replay) -> StepView:
    """Show where a replay is: the pool, the sequences, and what the step granted."""
    title = f"after step {replay.step}, at {replay.seconds:.3f} s"
    parts = [f"<b>{escape(title)}</b>", draw_pool(replay.blocks)._repr_html_(), scheduler_table(replay.scheduler)]
    if replay.grant is not None:
        parts.append(grant_table(replay.grant))
    return StepView(f"<{title}: {replay.scheduler!r}, {replay.blocks!r}>", "".join(parts))


def scrub(replay: Replay) -> Any:
    """Return a slider that moves a replay to a step and shows it; without ipywidgets, the step where it is."""
    try:
        from ipywidgets import HTML, IntSlider, VBox
    except ImportError:
        return view(replay)
    first, last = replay.first_step - 1, replay.last_step
    slider = IntSlider(replay.step, first, last, description="after step", continuous_update=False)
    shown = HTML(view(replay).html)

    def move(change: Any) -> None:
        shown.value = view(replay.at(change["new"])).html

    slider.observe(move, "value")

    class Scrubber(VBox):
        def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
            """Add what is shown where a notebook is only read, without a kernel behind the slider."""
            return {**(super()._repr_mimebundle_(**options) or {}), "text/html": shown.value}

    return Scrubber([slider, shown])
