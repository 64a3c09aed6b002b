"""Pictures of the schedule: what each request computed in each step, and how each step's token budget was used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import attrs

from trio_llm.core.block_manager import BlockManager, BlockState
from trio_llm.core.scheduler import Scheduler
from trio_llm.messages import BlockGrant, StepPlan, StepResult, StepTrace
from trio_llm.notebook.pictures import draw_diff
from trio_llm.notebook.svg import Picture, colour, fit, group, legend, rect, text, visible
from trio_llm.replay.explanation import Explanation

ROW, MARGIN, LEFT = 28, 16, 96
WIDEST = 820
_AGAIN, _LOST = ", again after a preemption", "lost its blocks; will be computed again"
_LEAST = 4.0
"""Height of one token in the budget: a bit more than it is, so that it can be seen."""


@attrs.frozen
class Cell:
    """What one request did in one step: `kind` is "queued", "prefill", "decode" or "preempted"."""

    kind: str
    count: int = 0
    start: int = 0
    token: str = ""
    hover: str = ""


@attrs.frozen
class Moment:
    """One step: what every request did, and the pool after it."""

    step: int
    cells: Mapping[int, Cell]
    blocks: tuple[BlockState, ...] = ()


class History:
    """Records steps that were made by hand, and draws them.

    Args:
        decode: Turns token ids into text, for what the pictures say of a token.
        budget_tokens: max_num_batched_tokens, the line that no step crosses.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], budget_tokens: int) -> None:
        self._decode = decode
        self._budget_tokens = budget_tokens
        self.moments: list[Moment] = []

    def add(
        self,
        scheduler: Scheduler,
        blocks: BlockManager,
        grant: BlockGrant,
        plan: StepPlan | None,
        result: StepResult | None,
    ) -> None:
        """Record the step that was just committed."""
        cells = {
            sequence.request_id: Cell("queued", hover="waits for blocks or budget") for sequence in scheduler.waiting
        }
        for request_id in grant.preempted:
            cells[request_id] = Cell("preempted", hover=_LOST)
        if plan is not None and result is not None:
            at = 0
            drafts = plan.drafts or (0,) * len(plan.counts)
            rows = zip(plan.request_ids, plan.starts, plan.counts, drafts, plan.samples, result.token_ids, strict=True)
            for request_id, start, count, num_drafts, samples, sampled in rows:
                token_ids = plan.token_ids[at : at + count]
                cells[request_id] = self._row(token_ids, start, num_drafts, samples, sampled)
                at += count
        self.moments.append(Moment(grant.step, cells, blocks.blocks()))

    def _row(
        self, token_ids: Sequence[int], start: int, num_drafts: int, samples: bool, sampled: Sequence[int]
    ) -> Cell:
        count = len(token_ids)
        token = visible(self._decode(sampled)) if sampled else ""
        read = f"computes positions {start} to {start + count - 1}: {visible(self._decode(token_ids))!r}"
        hover = f"{read}; samples {token!r}" if samples else f"{read}; the prompt goes on, nothing is sampled"
        decodes = count - num_drafts == 1 and samples and start
        return Cell("decode" if decodes else "prefill", count, start, token, hover)

    def timeline(self, title: str = "Requests by step") -> Picture:
        return draw_timeline(self.moments, title)

    def budget(self, title: str = "Token budget by step") -> Picture:
        return draw_budget(self.moments, self._budget_tokens, title)

    def diff(self, first: int = -2, second: int = -1) -> Picture:
        """Draw what changed in the pool between two remembered steps, given by their place in the history."""
        before, after = self.moments[first], self.moments[second]
        return draw_diff(before.blocks, after.blocks, f"What changed from step {before.step} to step {after.step}")


def moments_of(traces: Sequence[StepTrace], explained: Mapping[int, Explanation] | None = None) -> list[Moment]:
    """Read a live engine's trace: a row that starts before where its request had come was preempted in between.

    Or its last drafts were rejected.

    Args:
        explained: Request -> what tells when it waited and in which steps it lost its blocks: traces have only rows.
    """
    waits = _waits(explained or {})
    moments: list[Moment] = []
    ends: dict[int, int] = {}
    rejectable: dict[int, int] = {}
    for trace in traces:
        cells = waits.get(trace.stats.step, {})
        for request_id, start, count in zip(trace.request_ids, trace.starts, trace.counts, strict=True):
            expected = ends.get(request_id, 0)
            again = start < expected - rejectable.get(request_id, 0)
            decodes = count <= 1 + len(trace.stats.drafted) and 0 < start <= expected and not again
            rejectable[request_id] = count - 1 if decodes else 0
            hover = f"request {request_id}: positions {start} to {start + count - 1}{_AGAIN if again else ''}"
            cells[request_id] = Cell("decode" if decodes else "prefill", count, start, hover=hover)
            ends[request_id] = start + count
        moments.append(Moment(trace.stats.step, cells))
    return moments


def _waits(explained: Mapping[int, Explanation]) -> dict[int, dict[int, Cell]]:
    """Return step -> the cells of requests that waited in it or lost their blocks."""
    steps: dict[int, dict[int, Cell]] = {}
    for request_id, one in explained.items():
        for wait in one.waits:
            for step in range(wait.first_step, wait.last_step + 1):
                steps.setdefault(step, {})[request_id] = Cell("queued", hover=f"waits for {wait.reason}")
        for step in one.preempted_steps:
            steps.setdefault(step, {})[request_id] = Cell("preempted", hover=_LOST)
    return steps


def draw_timeline(moments: Sequence[Moment], title: str = "Requests by step") -> Picture:
    """Draw one row per request and one column per step that computed something; hover over a cell for its tokens."""
    moments = [moment for moment in moments if moment.cells]
    request_ids = sorted({request_id for moment in moments for request_id in moment.cells})
    wide = _column_width(moments)
    top = 58
    parts = [text(MARGIN, 26, title, "title"), text(MARGIN, top - 8, "step", "muted", size=10)]
    parts += _step_numbers(moments, wide, top - 8)
    for row, request_id in enumerate(request_ids):
        y = top + row * ROW
        parts.append(rect(MARGIN, y + 6, 12, 12, fill=colour(request_id), radius=3))
        parts.append(text(MARGIN + 18, y + 16, f"request {request_id}", size=11))
        for at, moment in enumerate(moments):
            if request_id in moment.cells:
                parts.append(_cell(LEFT + at * wide, y, wide - 2, request_id, moment.cells[request_id]))
    y = top + len(request_ids) * ROW + 20
    key, right = legend(MARGIN, y, _legend())
    return Picture(title, max(LEFT + len(moments) * wide + MARGIN, right), y + 16, "".join(parts) + key)


def _column_width(moments: Sequence[Moment]) -> float:
    return max(7.0, min(54.0, (WIDEST - LEFT) / max(1, len(moments))))


def _step_numbers(moments: Sequence[Moment], wide: float, y: float) -> list[str]:
    every = max(1, round(34 / wide))
    return [
        text(LEFT + (at + 0.5) * wide - 1, y, str(moments[at].step), "muted", size=10, anchor="middle")
        for at in range(0, len(moments), every)
    ]


def _cell(x: float, y: float, wide: float, request_id: int, cell: Cell) -> str:
    height = ROW - 6
    hover = f"request {request_id}, {cell.kind}: {cell.hover}"
    if cell.kind == "queued":
        return group([rect(x, y + 8, wide, height - 16, css="dash", radius=2)], hover)
    if cell.kind == "preempted":
        cross = text(x + wide / 2, y + 15, "✕", "alarm-text", size=11, anchor="middle")
        return group([rect(x + 1, y + 1, wide - 2, height - 2, css="alarm"), cross], hover)
    if cell.kind == "prefill":
        label = text(x + wide / 2, y + 15, str(cell.count), "on", size=11, anchor="middle") if wide > 18 else ""
        return group([rect(x, y, wide, height, fill=colour(request_id)), label], hover)
    label = (
        text(x + wide / 2, y + 15, fit(cell.token, wide + 4, 10), "mono", size=10, anchor="middle") if wide > 26 else ""
    )
    return group([rect(x, y, wide, height, fill=colour(request_id), opacity=0.45), label], hover)


def _legend() -> list[tuple[str, str]]:
    grey = "#8b949e"
    return [
        (rect(0, 2, 14, 8, css="dash", radius=2), "queued"),
        (rect(0, 0, 14, 12, fill=grey, radius=3), "prefill (tokens)"),
        (rect(0, 0, 14, 12, fill=grey, opacity=0.45, radius=3), "decode (the token)"),
        (rect(0, 0, 14, 12, css="alarm", radius=3), "preempted"),
    ]


def draw_budget(moments: Sequence[Moment], budget_tokens: int, title: str = "Token budget by step") -> Picture:
    """Draw a bar per step, its tokens by request: prefill chunks full, decodes pale, under the line of the budget."""
    moments = [moment for moment in moments if moment.cells]
    high, top = 140, 74
    wide, bottom = _column_width(moments), top + high
    parts = [
        text(MARGIN, 26, title, "title"),
        text(MARGIN, 44, f"dashed line: max_num_batched_tokens = {budget_tokens}", "muted", size=11),
        text(MARGIN, top + 4, f"{budget_tokens} tokens", "muted", size=10),
        text(MARGIN, bottom, "0", "muted", size=10),
        *_step_numbers(moments, wide, bottom + 15),
    ]
    for at, moment in enumerate(moments):
        parts += _bar(LEFT + at * wide, bottom, wide - 4, moment, high / budget_tokens)
    right = LEFT + len(moments) * wide
    parts.append(f'<line class="limit" x1="{LEFT}" x2="{right:g}" y1="{top}" y2="{top}"/>')
    parts.append(f'<line class="rule" x1="{LEFT}" x2="{right:g}" y1="{bottom}" y2="{bottom}"/>')
    return Picture(title, max(right + MARGIN, 360), bottom + 30, "".join(parts))


def _bar(x: float, bottom: float, wide: float, moment: Moment, high_per_token: float) -> list[str]:
    parts: list[str] = []
    y = bottom
    for request_id, cell in sorted(moment.cells.items(), key=lambda item: item[1].kind == "prefill"):
        if cell.count:
            tall = max(_LEAST, high_per_token * cell.count)
            y -= tall
            pale = 0.45 if cell.kind == "decode" else 1.0
            bar = rect(x, y, wide, tall - 1, fill=colour(request_id), opacity=pale, radius=2)
            parts.append(group([bar], f"request {request_id}, {cell.kind}: {cell.count} tokens"))
    used = sum(cell.count for cell in moment.cells.values())
    if used and wide > 16:
        parts.append(text(x + wide / 2, y - 4, str(used), "muted", size=10, anchor="middle"))
    return parts
