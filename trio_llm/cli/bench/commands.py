"""The commands of `trio-llm bench`, with the imports of each inside it."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import click

from trio_llm.cli.options import SettingsCommand, engine_settings_given, setting_options, settings_of

_COUNT = click.IntRange(min=1)
_repetitions = click.option("--repetitions", type=_COUNT, default=5, show_default=True, help="After one to warm up.")
_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, with the value of every repetition.")
_input = click.option("--input-tokens", type=_COUNT, default=32, show_default=True, help="Of each prompt.")
_output = click.option("--output-tokens", type=_COUNT, default=128, show_default=True, help="Of each answer.")
_flags = click.argument("flags", nargs=-1)


@click.group(short_help="Measure throughput and latency.")
def bench() -> None:
    """Measure: a server under load, one batch, many requests, or the way to the first token."""


@bench.command()
@click.option("--base-url", help="An OpenAI-compatible server that runs; default: one is started, and measured.")
@click.option("--api-key", envvar="VLLM_API_KEY", help="Key for that server. [VLLM_API_KEY]")
@click.option("--model", help="Model to ask for; default: the first that the server lists.")
@click.option("--clients", type=_COUNT, multiple=True, default=(1, 8, 32), show_default=True, help="Open at a time.")
@click.option("--num-requests", type=_COUNT, default=64, show_default=True, help="For each number of clients.")
@click.option("--prompt-words", type=_COUNT, default=40, show_default=True, help="Of each prompt; no two begin alike.")
@click.option("--max-tokens", type=_COUNT, default=64, show_default=True, help="Of each answer.")
@_repetitions
@_as_json
@_flags
def serve(
    base_url: str | None, api_key: str | None, model: str | None, as_json: bool, flags: tuple[str, ...], **load: Any
) -> None:
    """Stream completions from several clients at once. FLAGS, after --, are for the server that is started."""
    import trio

    from trio_llm.cli.bench.report import show
    from trio_llm.cli.bench.serve import Load, bench_own_server, bench_server
    from trio_llm.cli.client import Api

    if base_url is not None and flags:
        raise click.UsageError("FLAGS are for a server that is started here: leave out --base-url.")
    what = Load(**load)
    if base_url is None:
        measure = partial(bench_own_server, flags, what, model)
    else:
        measure = partial(bench_server, Api(base_url, api_key), what, model)
    rows = trio.run(partial(measure, progress=sys.stderr.isatty()))
    show("serve", rows, as_json=as_json)


@bench.command(cls=SettingsCommand, params=setting_options("engine"))
@_input
@_output
@click.option("--batch-size", type=_COUNT, default=8, show_default=True, help="Prompts at once.")
@_repetitions
@_as_json
def latency(config: Path | None, as_json: bool, **options: Any) -> None:
    """Measure one batch from its arrival to its last token, offline."""
    from trio_llm.cli.bench.offline import latency as measure
    from trio_llm.cli.bench.report import show

    settings = engine_settings_given(settings_of(config, None, options))
    shape = {name: options[name] for name in ("input_tokens", "output_tokens", "batch_size", "repetitions")}
    show("latency", measure(settings, **shape), as_json=as_json)


@bench.command(cls=SettingsCommand, params=setting_options("engine"))
@_input
@_output
@click.option("--num-requests", type=_COUNT, default=64, show_default=True, help="All there from the start.")
@_repetitions
@_as_json
def throughput(config: Path | None, as_json: bool, **options: Any) -> None:
    """Measure tokens a second of many requests at once, offline."""
    from trio_llm.cli.bench.offline import throughput as measure
    from trio_llm.cli.bench.report import show

    settings = engine_settings_given(settings_of(config, None, options))
    shape = {name: options[name] for name in ("input_tokens", "output_tokens", "num_requests", "repetitions")}
    show("throughput", measure(settings, **shape), as_json=as_json)


@bench.command()
@_repetitions
@_as_json
@_flags
def startup(repetitions: int, as_json: bool, flags: tuple[str, ...]) -> None:
    """Measure from the start of `trio-llm serve` to the first token. FLAGS, after --, are for it."""
    from trio_llm.cli.bench.report import show
    from trio_llm.cli.bench.startup import startup as measure

    show("startup", measure(flags, repetitions), as_json=as_json)
