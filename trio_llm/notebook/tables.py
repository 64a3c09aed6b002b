"""Messages as small tables, one line per request, for notebooks. Tokens stand there with their texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape

from trio_llm.core.scheduler import Scheduler
from trio_llm.messages import BlockAsk, BlockGrant, Commit, Finished, Started, StepPlan, StepResult, Tokens
from trio_llm.notebook.svg import visible

Decode = Callable[[Sequence[int]], str]
"""Turns token ids into text."""

_MAX_TOKENS = 4
_CELL = "padding:2px 10px;text-align:left;border-bottom:1px solid rgba(128,128,128,.3)"


def table(title: str, header: Sequence[str], rows: Iterable[Sequence[object]], note: str = "") -> str:
    """Return an HTML table."""
    head = "".join(f'<th style="{_CELL}">{escape(name)}</th>' for name in header)
    body = "".join(
        "<tr>" + "".join(f'<td style="{_CELL}">{escape(str(value))}</td>' for value in row) + "</tr>" for row in rows
    )
    below = f'<div style="opacity:.7;font-size:90%">{escape(note)}</div>' if note else ""
    return (
        f'<div style="margin:4px 0"><b>{escape(title)}</b>{below}'
        f'<table style="border-collapse:collapse;margin-top:4px"><tr>{head}</tr>{body}</table></div>'
    )


def spell(token_ids: Sequence[int], decode: Decode | None, most: int = _MAX_TOKENS) -> str:
    """Write tokens as ids with their texts; the first ones, if they are many."""
    texts = [f"{one} {visible(decode([one]))!r}" if decode else str(one) for one in token_ids[:most]]
    if len(token_ids) > most:
        texts.append(f"… {len(token_ids)} in all")
    return ", ".join(texts)


def scheduler_table(scheduler: Scheduler, decode: Decode | None = None) -> str:
    """Show the sequences in policy order."""
    rows = [
        (one.request_id, one.status.value, len(one.prompt), len(one.tokens) - len(one.prompt), one.computed,
         spell(one.tokens[-1:], decode))
        for one in (*scheduler.running, *scheduler.waiting)
    ]  # fmt: skip
    header = ("request", "is", "prompt tokens", "output tokens", "computed", "newest token")
    return table(repr(scheduler)[1:-1], header, rows)


def ask_table(ask: BlockAsk, decode: Decode | None = None) -> str:
    """Show what the scheduler asks for: running rows first, then waiting ones."""
    rows: list[tuple[object, ...]] = [
        (request_id, "running", f"{start} → {end}", spell(new, decode))
        for request_id, start, end, new in zip(ask.request_ids, ask.starts, ask.ends, ask.new_token_ids, strict=True)
    ]
    rows += [(request_id, "waiting", "", "") for request_id in ask.waiting]
    notes = [f"token budget {ask.token_budget}"]
    if ask.admits:
        notes.append("new: " + ", ".join(f"request {a.request_id} ({len(a.token_ids)} tokens)" for a in ask.admits))
    if ask.released:
        notes.append("ended: " + ", ".join(f"request {request_id}" for request_id in ask.released))
    header = ("request", "is", "would compute", "sampled since")
    return table(f"BlockAsk, step {ask.step}", header, rows, "; ".join(notes))


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


def plan_table(plan: StepPlan, decode: Decode | None = None) -> str:
    """Show the ragged batch."""
    rows: list[tuple[object, ...]] = []
    at = 0
    columns = zip(plan.request_ids, plan.starts, plan.counts, plan.samples, plan.new_blocks, strict=True)
    for request_id, start, count, samples, new in columns:
        tokens = spell(plan.token_ids[at : at + count], decode)
        rows.append((request_id, start, count, tokens, "yes" if samples else "no", _blocks(new)))
        at += count
    note = f"{len(plan.token_ids)} tokens in one forward pass"
    if plan.admitted:
        note += "; the runner learns " + ", ".join(f"request {a.request_id}" for a in plan.admitted)
    if plan.dropped:
        note += "; it forgets " + ", ".join(f"request {request_id}" for request_id in plan.dropped)
    header = ("request", "start", "count", "tokens", "samples", "new blocks")
    return table(f"StepPlan {plan.step}", header, rows, note)


def _blocks(new: tuple[tuple[int, tuple[int, ...]], ...]) -> str:
    return "; ".join(f"table[{at}:] = {list(ids)}" for at, ids in new if ids)


def result_table(result: StepResult, decode: Decode | None = None) -> str:
    """Show what the runner sampled, row by row in the plan's order."""
    rows = [(at, spell(token_ids, decode)) for at, token_ids in enumerate(result.token_ids)]
    return table(f"StepResult {result.step}", ("row", "sampled"), rows, f"{result.seconds * 1000:.1f} ms in the model")


def commit_table(commit: Commit, decode: Decode | None = None) -> str:
    """Show the events for clients."""
    rows: list[tuple[object, ...]] = []
    for request_id, event in commit.events:
        what: object = event
        if isinstance(event, Tokens):
            what = f"token {spell(event.token_ids, decode)}"
        elif isinstance(event, Started):
            what = f"{event.cached_tokens} tokens of the prompt were cached"
        elif isinstance(event, Finished):
            what = f"finished: {event.reason}, {event.usage.prompt_tokens} + {event.usage.completion_tokens} tokens"
        rows.append((request_id, type(event).__name__, what))
    stats = commit.stats
    note = f"{stats.num_running} running, {stats.num_waiting} waiting"
    return table(f"Commit of step {stats.step}", ("request", "event", ""), rows, note)
