"""A record for other tools: Chrome's trace format, which Perfetto reads, and tables as CSV."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from trio_llm.replay.lives import Life, StepRow, follow
from trio_llm.replay.replay import Replay

_COLUMNS = "step at_s model_s request start count drafts kind rows tokens running waiting used_blocks cached_blocks"
_STEPS, _REQUESTS = 1, 2
"""Process ids of the two groups of tracks in the Chrome trace."""


def write_chrome(replay: Replay, file: TextIO) -> None:
    """Write steps, requests and counters as Chrome trace events."""
    lives, steps = follow(replay)
    json.dump({"displayTimeUnit": "ms", "traceEvents": list(_events(lives, steps))}, file)


def write_csv(replay: Replay, file: TextIO) -> None:
    """Write one line per row of each step."""
    lives, steps = follow(replay)
    by_step = {row.step: row for row in steps}
    writer = csv.writer(file)
    writer.writerow(_COLUMNS.split())
    rows = sorted(
        ((chunk.step, life.request_id, chunk) for life in lives for chunk in life.chunks), key=lambda row: row[:2]
    )
    for step, request_id, chunk in rows:
        if (row := by_step.get(step)) is not None:
            at_s, model_s = round(row.at_s, 6), round(row.seconds, 6)
            kind = "decode" if chunk.decodes else "prefill"
            about = (row.num_rows, row.num_tokens, row.num_running, row.num_waiting, row.used_blocks, row.cached_blocks)
            writer.writerow((step, at_s, model_s, request_id, chunk.start, chunk.count, chunk.drafts, kind, *about))


def _events(lives: Sequence[Life], steps: Sequence[StepRow]) -> Iterator[dict[str, Any]]:
    for process, name in ((_STEPS, "engine"), (_REQUESTS, "requests")):
        yield {"ph": "M", "pid": process, "tid": 0, "name": "process_name", "args": {"name": name}}
    ends_s = {row.step: row.at_s for row in steps}
    for row in steps:
        start_s = max(0.0, row.at_s - row.seconds)
        args = {"rows": row.num_rows, "tokens": row.num_tokens, "prefill tokens": row.num_prefill_tokens}
        yield _span(_STEPS, 1, f"step {row.step}", start_s, row.at_s, args)
        yield _counters("blocks", row.at_s, {"used": row.used_blocks, "cached": row.cached_blocks})
        yield _counters("requests", row.at_s, {"running": row.num_running, "waiting": row.num_waiting})
    last_s = steps[-1].at_s if steps else 0.0
    for life in lives:
        yield from _phases(life, ends_s, last_s)


def _phases(life: Life, ends_s: dict[int, float], last_s: float) -> Iterator[dict[str, Any]]:
    arrived_s = life.arrived_s or 0.0
    ended_s = last_s if life.ended_s is None else life.ended_s
    about = {
        "prompt tokens": life.request.num_prompt_tokens,
        "cached tokens": life.num_cached_tokens,
        "output tokens": life.num_output_tokens,
        "end": life.reason,
    }
    track = life.request_id
    yield {"ph": "M", "pid": _REQUESTS, "tid": track, "name": "thread_name", "args": {"name": f"request {track}"}}
    started_s = ended_s if life.started_s is None else life.started_s
    yield _span(_REQUESTS, track, "queued", arrived_s, started_s, about)
    first_s = ended_s if life.first_token_s is None else life.first_token_s
    yield _span(_REQUESTS, track, "prefill", started_s, first_s, about)
    yield _span(_REQUESTS, track, "decode", first_s, ended_s, about)
    for step in life.preempted:
        at_us = ends_s.get(step, ended_s) * 1e6
        yield {"ph": "i", "s": "t", "pid": _REQUESTS, "tid": track, "name": "preempted", "ts": at_us}


def _span(process: int, track: int, name: str, start_s: float, end_s: float, args: dict[str, Any]) -> dict[str, Any]:
    lasts_us = max(0.0, end_s - start_s) * 1e6
    return {
        "ph": "X", "pid": process, "tid": track, "name": name, "ts": start_s * 1e6, "dur": lasts_us, "args": args,
    }  # fmt: skip


def _counters(name: str, at_s: float, values: dict[str, int]) -> dict[str, Any]:
    return {"ph": "C", "pid": _STEPS, "name": name, "ts": at_s * 1e6, "args": values}
