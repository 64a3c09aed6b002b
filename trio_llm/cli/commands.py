"""The commands, with the imports of each inside it: `--help` needs none of them."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import click

import trio_llm
from trio_llm.cli.bench.commands import bench
from trio_llm.cli.group import CommandGroup
from trio_llm.cli.options import SettingsCommand, flags_given, setting_options, settings_of
from trio_llm.cli.settings import SECTIONS

_SEED = click.IntRange(0, 2**63 - 1)


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(trio_llm.__version__, prog_name="trio-llm")
def cli() -> None:
    """Run language models: an OpenAI-compatible server, and the same engine offline."""


@cli.command(cls=SettingsCommand, params=setting_options(*SECTIONS), short_help="Serve a model over HTTP.")
@click.argument("model", required=False)
@click.option("--print-config", is_flag=True, help="Print every setting and where its value came from, then exit.")
def serve(config: Path | None, model: str | None, print_config: bool, **options: Any) -> None:
    """Serve MODEL over HTTP: by default the demo model, on port 8000."""
    settings = settings_of(config, model, options)
    if print_config:
        from trio_llm.cli.show import settings_table

        click.echo(settings_table(settings))
        return
    gc.disable()  # until it is ready: a twentieth of the start, and there is next to nothing to collect
    from trio_llm.cli.serve import run

    sys.exit(run(settings, lambda: settings_of(config, model, options)))


@cli.command(
    cls=SettingsCommand,
    params=setting_options("engine", leave_out=("engine.seed",)),
    short_help="Answer prompts without a server.",
)
@click.argument("prompts", nargs=-1)
@click.option(
    "--file", "-f", type=click.File(encoding="utf-8"), help="Read prompts from a file, one a line; - is stdin."
)
@click.option("--raw", is_flag=True, help="Complete the prompt as it is, without the model's chat template.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=256, show_default=True, help="Longest answer.")
@click.option("--temperature", type=click.FloatRange(0, 2), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True, help="Nucleus.")
@click.option("--seed", type=_SEED, help="Seed of sampling: the same seed gives the same answer.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line instead of the text.")
def generate(config: Path | None, prompts: tuple[str, ...], **options: Any) -> None:
    """Answer PROMPTS offline, on the same engine that serves; without any, those of --file or stdin."""
    from trio_llm.cli.generate import run

    run(settings_of(config, None, options), prompts, **{name: options[name] for name in _GENERATE_OPTIONS})


_GENERATE_OPTIONS = ("file", "raw", "max_tokens", "temperature", "top_p", "seed", "as_json")


# What a plan decides itself.
_PLANNED = ("engine.max_model_len", "engine.max_batch_size", "engine.num_kv_blocks")
_OWN_MODEL = ("engine", "server.served_model_name", "server.chat_template")


@cli.command(
    cls=SettingsCommand,
    params=setting_options(*_OWN_MODEL, leave_out=("engine.seed",)),
    short_help="Chat with a model in the terminal.",
)
@click.option("--base-url", help="Talk to this OpenAI-compatible server, e.g. http://localhost:8000/v1.")
@click.option("--api-key", envvar="VLLM_API_KEY", help="Key for that server. [VLLM_API_KEY]")
@click.option("--system", help="System prompt of every conversation.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Longest answer; default: the rest of the context.")
@click.option("--temperature", type=click.FloatRange(0, 2), help="0 is greedy; default: the server's.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="Nucleus; default: the server's.")
@click.option("--seed", type=_SEED, help="Seed of sampling: the same seed gives the same answers.")
def chat(config: Path | None, base_url: str | None, api_key: str | None, system: str | None, **options: Any) -> None:
    """Chat in the terminal: with the server at --base-url, else with a model loaded here, by default the demo model."""
    parameters = {name: options.pop(name) for name in ("max_tokens", "temperature", "top_p", "seed")}
    flags = flags_given(options)
    model = flags.pop("engine.model", None)
    if base_url is not None and flags:
        raise click.UsageError(f"{next(iter(flags.values())).source} is for a model loaded here, not for --base-url.")
    from trio_llm.cli.chat import run
    from trio_llm.cli.client import Api

    if base_url is None:
        run(settings_of(config, None, options), None, None, system, parameters)
    else:
        run(settings_of(config, None, {}), Api(base_url, api_key), model and model.value, system, parameters)


@cli.command(
    "run-batch",
    cls=SettingsCommand,
    params=setting_options(*_OWN_MODEL),
    short_help="Answer a file of requests without a server.",
)
@click.option(
    "--input",
    "-i",
    required=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Requests, JSONL.",
)
@click.option(
    "--output", "-o", required=True, type=click.Path(path_type=Path, dir_okay=False), help="Answers in their order."
)
def run_batch(config: Path | None, input: Path, output: Path, **options: Any) -> None:
    """Answer a file of requests offline, in OpenAI's batch format. Exit 1: some failed; 2: the input is no batch."""
    settings = settings_of(config, None, options)
    from trio_llm.cli.run_batch import run

    sys.exit(run(settings, input, output))


@cli.command(short_help="Fetch a model from the Hugging Face hub.")
@click.argument("model", metavar="OWNER/NAME[:TAG]")
@click.option("--revision", help="Branch, tag or commit; default: the repository's default branch.")
@click.option(
    "--include", multiple=True, metavar="PATTERN", help="Fetch the files of this pattern instead of what serve reads."
)
def pull(model: str, revision: str | None, include: tuple[str, ...]) -> None:
    """Fetch a model into Hugging Face's cache and print where it is; of a GGUF repository, the file that TAG names."""
    from trio_llm.cli.hub import pull as run

    run(model, revision, include)


@cli.command(short_help="List the models in Hugging Face's cache.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per model instead of the table.")
def models(as_json: bool) -> None:
    """List the models in Hugging Face's cache: which can be served, their format, bytes and path."""
    from trio_llm.cli.hub import list_models

    list_models(as_json=as_json)


@cli.command(short_help="Compare a model with transformers.")
@click.argument("model", required=False)
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line instead of the table.")
def verify(model: str | None, revision: str | None, device: str, as_json: bool) -> None:
    """Compare MODEL with transformers, through cache, chunks, batches, preemption and speculation. Exit 1: it differs.

    Both compute in float32, transformers on the CPU; quantized weights are widened for both. Needs the extra `verify`.
    """
    from trio_llm.cli.verify import run

    sys.exit(run(model, revision, device, as_json=as_json))


@cli.command(
    cls=SettingsCommand,
    params=setting_options("engine", leave_out=_PLANNED),
    short_help="Say what a number of users needs.",
)
@click.argument("model", required=False)
@click.option("--users", type=click.IntRange(1, 65_536), required=True, help="Sequences that are generated at a time.")
@click.option("--context", type=click.IntRange(min=1), required=True, help="Tokens of each, prompt and output.")
@click.option("--rate", type=click.FloatRange(0, min_open=True), help="Output tokens a second for each user.")
@click.option(
    "--device-memory",
    type=click.FloatRange(0, min_open=True),
    metavar="GIB",
    help="Of a device; default: this machine's.",
)
@click.option(
    "--bandwidth", type=click.FloatRange(0, min_open=True), metavar="GB/S", help="What a device reads from its memory."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the tables.")
def plan(config: Path | None, model: str | None, as_json: bool, **options: Any) -> None:
    """Say how many devices MODEL needs for --users with --context tokens each, and what fewer cost; reads no weights.

    With --device cuda and --device-memory no GPU is needed here. --rate is checked against --bandwidth.
    """
    users, context, rate = (options.pop(name) for name in ("users", "context", "rate"))
    memory, bandwidth = options.pop("device_memory"), options.pop("bandwidth")
    settings = settings_of(config, model, options)
    from trio_llm.cli.plan import run
    from trio_llm.model.capacity import Demand

    demand = Demand(
        users=users,
        context=context,
        rate=rate,
        device_bytes=memory and int(memory * 2**30),
        bandwidth=bandwidth and bandwidth * 1e9,
    )
    run(settings.config.engine, demand, as_json=as_json)


cli.add_command(bench)


@cli.command(short_help="Print or export a record of a server's steps.")
@click.argument("file", type=click.Path(path_type=Path, exists=True))
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "chrome", "csv"]),
    default="text",
    show_default=True,
    help="chrome is for Perfetto; csv has a line for each row of each step.",
)
@click.option("--output", "-o", type=click.Path(path_type=Path, dir_okay=False), help="File for chrome and csv.")
@click.option("--steps", type=(int, int), metavar="FIRST LAST", help="Print a table of these steps.")
@click.option("--requests", is_flag=True, help="Print a table of the requests.")
def trace(file: Path, form: str, output: Path | None, steps: tuple[int, int] | None, requests: bool) -> None:
    """Replay FILE, which `serve --record` wrote, and print or export it; of a directory, its newest file."""
    from trio_llm.cli.trace import run

    run(file, form=form, output=output, steps=steps, requests=requests)


@cli.command(
    "check-config",
    cls=SettingsCommand,
    params=setting_options(*SECTIONS),
    short_help="Check the settings without starting.",
)
@click.argument("model", required=False)
def check_config(config: Path | None, model: str | None, **options: Any) -> None:
    """Check the settings as `serve` would, without loading a model."""
    settings = settings_of(config, model, options)
    given = sum(source != "default" for source in settings.sources.values())
    click.echo(f"ok: {given} of {len(settings.sources)} settings are given, the others have their defaults")


@cli.command("collect-env", short_help="Print what a bug report needs.")
def collect_env() -> None:
    """Print what a bug report needs: versions, processor, memory, GPU."""
    from trio_llm.cli.show import environment_report

    click.echo(environment_report())
