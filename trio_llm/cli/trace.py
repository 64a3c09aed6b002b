"""`trio-llm trace`: prints a record, or exports it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import TextIO

import click
from rich import box
from rich.console import Console
from rich.table import Table

from trio_llm.cli.output_file import check_output
from trio_llm.errors import RecordError
from trio_llm.replay import Replay
from trio_llm.replay.export import write_chrome, write_csv
from trio_llm.replay.lives import Life, StepRow, follow

_WRITERS: dict[str, Callable[[Replay, TextIO], None]] = {"chrome": write_chrome, "csv": write_csv}


def run(path: Path, *, form: str, output: Path | None, steps: tuple[int, int] | None, requests: bool) -> None:
    """Print or write a record.

    Raises:
        ClickException: It cannot be read or replayed, options do not go together, or the output is the record.
    """
    if form in _WRITERS and (steps is not None or requests):
        raise click.UsageError("--steps and --requests print tables: leave out --format.")
    if form not in _WRITERS and output is not None:
        raise click.UsageError(f"--output is for --format {' and '.join(_WRITERS)}.")
    try:
        replay = Replay.open(path)
        if output is not None:
            check_output(output, replay.record.path)
        if replay.record.notice is not None:
            click.echo(f"note: {replay.record.notice}", err=True)
        if form in _WRITERS:
            with nullcontext(sys.stdout) if output is None else output.open("w", encoding="utf-8", newline="") as file:
                _WRITERS[form](replay, file)
        else:
            _show(replay, steps, requests=requests)
    except BrokenPipeError:
        raise  # Click ends quietly: whoever reads the table, `head` for example, has enough.
    except (RecordError, OSError) as error:
        raise click.ClickException(str(error)) from None


def _show(replay: Replay, steps: tuple[int, int] | None, *, requests: bool) -> None:
    lives, rows = follow(replay)
    console = Console()
    if steps is not None:
        shown = [row for row in rows if steps[0] <= row.step <= steps[1]]
        if not shown:
            reach = f"{replay.first_step} to {replay.last_step}"
            raise click.UsageError(f"There is no step from {steps[0]} to {steps[1]}: the record has {reach}.")
        console.print(_steps_table(shown))
    if requests:
        console.print(_requests_table(lives))
    if steps is None and not requests:
        for line in _summary(replay, lives, rows):
            console.print(line, highlight=False, markup=False)


def _summary(replay: Replay, lives: Sequence[Life], rows: Sequence[StepRow]) -> list[str]:
    header, setup = replay.record.header, replay.setup
    started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(header.started_at))
    pool = f"{setup.num_kv_blocks} blocks of {'/'.join(str(group.block_size) for group in setup.groups)} tokens"
    ended = sum(life.reason is not None for life in lives)
    model_s = [row.seconds for row in rows]
    ttft = [life.first_token_s - life.arrived_s for life in lives if _has_both(life.arrived_s, life.first_token_s)]  # type: ignore[operator]
    queue = [life.started_s - life.arrived_s for life in lives if _has_both(life.arrived_s, life.started_s)]  # type: ignore[operator]
    tokens = "with token ids" if header.tokens else "without token ids"
    return [
        f"{replay.record.path}: {header.model}, trio-llm {header.version}, {tokens}, began {started}",
        f"engine: {pool}, {setup.max_num_batched_tokens} tokens and {setup.max_batch_size} sequences in a step, "
        f"{setup.scheduling_policy}, {setup.steps_in_flight} in flight",
        f"steps {replay.first_step} to {replay.last_step}: {sum(row.num_tokens for row in rows)} tokens, "
        f"{sum(model_s):.3f} s in the model, {1000 * median(model_s):.2f} ms per step (median); "
        f"every grant and plan is the recorded one",
        f"requests: {len(lives)}, {ended} of them ended, {sum(len(life.preempted) for life in lives)} preemptions, "
        f"{sum(life.num_cached_tokens for life in lives)} prompt tokens from the cache, "
        f"{sum(life.num_accepted for life in lives)} of {sum(life.num_drafts for life in lives)} drafts accepted",
        f"median time to first token {_ms(ttft)}, of it in the queue {_ms(queue)}",
    ]


def _has_both(first: float | None, second: float | None) -> bool:
    return first is not None and second is not None


def _ms(seconds: Sequence[float]) -> str:
    return f"{1000 * median(seconds):.1f} ms" if seconds else "-"


def _steps_table(rows: Sequence[StepRow]) -> Table:
    names = "step,at s,model ms,rows,tokens,prefill,running,waiting,lost,used blocks,cached"
    table = _table(names)
    for row in rows:
        counts = (row.num_rows, row.num_tokens, row.num_prefill_tokens, row.num_running, row.num_waiting)
        pool = (row.num_preempted, row.used_blocks, row.cached_blocks)
        table.add_row(str(row.step), f"{row.at_s:.4f}", f"{1000 * row.seconds:.2f}", *map(str, counts + pool))
    return table


def _requests_table(lives: Sequence[Life]) -> Table:
    table = _table("request,prompt,cached,output,arrived s,started,first token,ended,lost,why")
    for life in lives:
        arrived = "before" if life.arrived_s is None else f"{life.arrived_s:.4f}"
        sizes = (life.request.num_prompt_tokens, life.num_cached_tokens, life.num_output_tokens)
        at = [_step(step) for step in (life.started_step, life.first_token_step, life.ended_step)]
        lost = ", ".join(map(str, life.preempted))
        table.add_row(str(life.request_id), *map(str, sizes), arrived, *at, lost, life.reason or "")
    table.caption = "started, first token, ended and lost (preempted) are steps"
    return table


def _table(names: str) -> Table:
    """Return an empty table with no more lines in it than 80 columns have room for."""
    return Table(*names.split(","), box=box.SIMPLE_HEAD, padding=0, pad_edge=False)


def _step(step: int | None) -> str:
    return "" if step is None else str(step)
