"""The commands, with the imports of each inside it: `--help` needs none of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

import trio_llm
from trio_llm.cli.bench.commands import bench
from trio_llm.cli.options import SettingsCommand, flags_given, setting_options, settings_of
from trio_llm.cli.settings import SECTIONS


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(trio_llm.__version__, prog_name="trio-llm")
def cli() -> None:
    """Run language models: an OpenAI-compatible server, and the same engine offline."""


@cli.command(cls=SettingsCommand, params=setting_options(*SECTIONS))
@click.argument("model", required=False)
@click.option("--print-config", is_flag=True, help="Print every setting and where its value came from, then exit.")
def serve(config: Path | None, model: str | None, print_config: bool, **options: Any) -> None:
    """Serve MODEL over HTTP: by default the demo model, on port 8000."""
    settings = settings_of(config, model, options)
    if print_config:
        from trio_llm.cli.show import settings_table

        click.echo(settings_table(settings))
        return
    from trio_llm.cli.serve import run

    sys.exit(run(settings))


@cli.command(cls=SettingsCommand, params=setting_options("engine"))
@click.argument("prompts", nargs=-1)
@click.option(
    "--file", "-f", type=click.File(encoding="utf-8"), help="Read prompts from a file, one a line; - is stdin."
)
@click.option("--raw", is_flag=True, help="Complete the prompt as it is, without the model's chat template.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=256, show_default=True, help="Longest answer.")
@click.option("--temperature", type=click.FloatRange(0, 2), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True, help="Nucleus.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line instead of the text.")
def generate(config: Path | None, prompts: tuple[str, ...], **options: Any) -> None:
    """Answer PROMPTS offline, on the same engine that serves; without any, those of --file or stdin."""
    from trio_llm.cli.generate import run

    run(settings_of(config, None, options), prompts, **{name: options[name] for name in _GENERATE_OPTIONS})


_GENERATE_OPTIONS = ("file", "raw", "max_tokens", "temperature", "top_p", "as_json")


_OWN_MODEL = ("engine", "server.served_model_name", "server.chat_template")


@cli.command(cls=SettingsCommand, params=setting_options(*_OWN_MODEL))
@click.option("--base-url", help="Talk to this OpenAI-compatible server, e.g. http://localhost:8000/v1.")
@click.option("--api-key", envvar="VLLM_API_KEY", help="Key for that server. [VLLM_API_KEY]")
@click.option("--system", help="What the model is told before every conversation.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Longest answer; default: the rest of the context.")
@click.option("--temperature", type=click.FloatRange(0, 2), help="0 is greedy; default: the server's.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="Nucleus; default: the server's.")
def chat(config: Path | None, base_url: str | None, api_key: str | None, system: str | None, **options: Any) -> None:
    """Chat in the terminal: with the server at --base-url, else with a model loaded here, by default the demo model."""
    parameters = {name: options.pop(name) for name in ("max_tokens", "temperature", "top_p")}
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


@cli.command("run-batch", cls=SettingsCommand, params=setting_options(*_OWN_MODEL))
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


cli.add_command(bench)


@cli.command("check-config", cls=SettingsCommand, params=setting_options(*SECTIONS))
@click.argument("model", required=False)
def check_config(config: Path | None, model: str | None, **options: Any) -> None:
    """Read the settings as `serve` would and say whether they are good; loads no model."""
    settings = settings_of(config, model, options)
    given = sum(source != "default" for source in settings.sources.values())
    click.echo(f"ok: {given} of {len(settings.sources)} settings are given, the others have their defaults")


@cli.command("collect-env")
def collect_env() -> None:
    """Print what a bug report needs: versions, processor, memory, GPU."""
    from trio_llm.cli.show import environment_report

    click.echo(environment_report())
