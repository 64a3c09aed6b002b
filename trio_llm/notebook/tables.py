"""Messages as small tables: what one actor tells the next, one line per request, for a notebook's eyes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from trio_llm.messages import BlockAsk, BlockGrant, Commit, Finished, Started, StepPlan, StepResult, Tokens

_CELL = "padding:2px 10px;text-align:left;border-bottom:1px solid rgba(128,128,128,.3)"


def table(title: str, header: Sequence[str], rows: Iterable[Sequence[object]], note: str = "") -> str:
    """Write an HTML table; long values are cut, since a prompt is no reading matter."""
    head = "".join(f'<th style="{_CELL}">{escape(name)}</th>' for name in header)
    body = "".join(
        "<tr>" + "".join(f'<td style="{_CELL}">{escape(_short(value))}</td>' for value in row) + "</tr>" for row in rows
    )
    below = f'<div style="opacity:.7;font-size:90%">{escape(note)}</div>' if note else ""
    return (
        f'<div style="margin:4px 0"><b>{escape(title)}</b>{below}'
        f'<table style="border-collapse:collapse;margin-top:4px"><tr>{head}</tr>{body}</table></div>'
    )


def _short(value: object) -> str:
    if isinstance(value, tuple) and len(value) > 8:
        shown = ", ".join(map(str, value[:5]))
        return f"({shown}, … {len(value)} in all)"
    return str(value)


def ask_table(ask: BlockAsk) -> str:
    """Show what the scheduler wants: running rows first, then who waits."""
    rows: list[tuple[object, ...]] = [
        (request_id, "running", f"{start} → {end}", ", ".join(map(str, new)))
        for request_id, start, end, new in zip(ask.request_ids, ask.starts, ask.ends, ask.new_token_ids, strict=True)
    ]
    rows += [(request_id, "waiting", "", "") for request_id in ask.waiting]
    told = [f"token budget {ask.token_budget}"]
    if ask.admits:
        told.append("new: " + ", ".join(f"request {a.request_id} ({len(a.token_ids)} tokens)" for a in ask.admits))
    if ask.released:
        told.append("ended: " + ", ".join(f"request {request_id}" for request_id in ask.released))
    header = ("request", "is", "would compute", "sampled since")
    return table(f"BlockAsk, step {ask.step}", header, rows, "; ".join(told))


def grant_table(grant: BlockGrant) -> str:
    """Show which rows got their blocks."""
    admitted_from = len(grant.request_ids) - grant.num_admitted
    rows = [
        (request_id, f"{start} → {start + count}", _blocks(new), _how(at >= admitted_from, start))
        for at, (request_id, start, count, new) in enumerate(
            zip(grant.request_ids, grant.starts, grant.counts, grant.new_blocks, strict=True)
        )
    ]
    note = ", ".join(f"request {request_id} is preempted" for request_id in grant.preempted)
    return table(f"BlockGrant, step {grant.step}", ("request", "computes", "new blocks", ""), rows, note)


def _how(admitted: bool, start: int) -> str:
    if not admitted:
        return ""
    return f"admitted, {start} tokens found in the prefix cache" if start else "admitted"


def plan_table(plan: StepPlan) -> str:
    """Show the ragged batch."""
    rows: list[tuple[object, ...]] = []
    at = 0
    columns = zip(plan.request_ids, plan.starts, plan.counts, plan.samples, plan.new_blocks, strict=True)
    for request_id, start, count, samples, new in columns:
        rows.append(
            (request_id, start, count, plan.token_ids[at : at + count], "yes" if samples else "no", _blocks(new))
        )
        at += count
    note = f"{len(plan.token_ids)} tokens in one forward pass"
    if plan.admitted:
        note += "; the runner learns " + ", ".join(f"request {a.request_id}" for a in plan.admitted)
    if plan.dropped:
        note += "; it forgets " + ", ".join(f"request {request_id}" for request_id in plan.dropped)
    header = ("request", "start", "count", "token ids", "samples", "new blocks")
    return table(f"StepPlan {plan.step}", header, rows, note)


def _blocks(new: tuple[tuple[int, tuple[int, ...]], ...]) -> str:
    return "; ".join(f"table[{at}:] = {list(ids)}" for at, ids in new if ids)


def result_table(result: StepResult) -> str:
    """Show what the runner sampled, row by row in the plan's order."""
    rows = [(at, token_ids) for at, token_ids in enumerate(result.token_ids)]
    return table(f"StepResult {result.step}", ("row", "sampled"), rows, f"{result.seconds * 1000:.1f} ms in the model")


def commit_table(commit: Commit) -> str:
    """Show what clients are to hear."""
    rows: list[tuple[object, ...]] = []
    for request_id, event in commit.events:
        what: object = event
        if isinstance(event, Tokens):
            what = f"token {', '.join(map(str, event.token_ids))}"
        elif isinstance(event, Started):
            what = f"{event.cached_tokens} tokens of the prompt were cached"
        elif isinstance(event, Finished):
            what = f"finished: {event.reason}, {event.usage.prompt_tokens} + {event.usage.completion_tokens} tokens"
        rows.append((request_id, type(event).__name__, what))
    stats = commit.stats
    note = f"{stats.num_running} running, {stats.num_waiting} waiting"
    return table(f"Commit of step {stats.step}", ("request", "event", ""), rows, note)
