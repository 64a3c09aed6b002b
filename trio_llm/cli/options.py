"""Command-line options made from the settings, and clear words for vLLM's flags that do not exist here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import click

from trio_llm.cli.hints import HINTS
from trio_llm.cli.settings import Given, Settings, fields, load_settings, metavar, unknown_variables

REPEAT = "A flag with several values is repeated: {flag} A {flag} B."


class SettingsCommand(click.Command):
    """A command that shows its settings by section and explains the vLLM flags that it does not have."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse as click does; a flag known from vLLM is refused with what to do instead."""
        given = list(args)  # click empties the list
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if hint := HINTS.get(error.option_name):
                raise click.UsageError(f"No such option: {error.option_name}. {hint}", ctx) from None
            raise
        except click.UsageError as error:
            if error.message.startswith("Got unexpected extra") and (hint := self._repeat_hint(given)):
                raise click.UsageError(f"{error.message.rstrip('.')}. {hint}", ctx) from None
            raise

    def _repeat_hint(self, args: list[str]) -> str:
        """Say how a flag takes several values, if one is given that does: vLLM's take them one after the other."""
        several = {
            flag
            for option in self.params
            if isinstance(option, click.Option) and option.multiple
            for flag in option.opts
        }
        for flag in several.intersection(args):
            return REPEAT.format(flag=flag)
        return ""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, those that are settings under the name of their section."""
        groups: dict[str, list[tuple[str, str]]] = {"Options": []}
        for parameter in self.get_params(ctx):
            if isinstance(parameter, click.Option) and (record := parameter.get_help_record(ctx)) is not None:
                section, is_setting, _ = str(parameter.name).partition("__")
                groups.setdefault(f"{section.capitalize()} settings" if is_setting else "Options", []).append(record)
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records)


def setting_options(*names: str, leave_out: tuple[str, ...] = ()) -> list[click.Parameter]:
    """Make one option for each of these settings, a section standing for all of its own, and `--config`."""
    return [
        click.Option(
            ["--config", "-c"],
            type=click.Path(path_type=Path, dir_okay=False),
            help="YAML file with settings; default: ./config.yaml where it exists.",
        ),
        *(
            _option(key, attribute)
            for key, attribute in fields()
            if (key in names or key.split(".")[0] in names) and key not in leave_out
        ),
    ]


def _option(key: str, attribute: attrs.Attribute[Any]) -> click.Option:
    flags = list(attribute.metadata["flags"])
    notes = [attribute.metadata["help"]]
    if variable := attribute.metadata["env"]:
        notes.append(f"[{variable}]")
    if attribute.default not in (None, ()):
        notes.append(f"[default: {as_text(attribute.default)}]")
    if attribute.type in (bool, bool | None):
        flags = [f"{flag}/--no-{flag.removeprefix('--')}" for flag in flags]
    return click.Option(
        [*flags, key.replace(".", "__")],
        default=None,
        multiple=attribute.type == tuple[str, ...],
        metavar=metavar(attribute.type),
        help=" ".join(notes),
    )


def as_text(value: Any) -> str:
    """Write a setting's value as config.yaml would hold it."""
    if value is None:
        return "null"
    if isinstance(value, tuple):
        return "[" + ", ".join(value) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def settings_of(config: Path | None, model: str | None, options: Mapping[str, Any]) -> Settings:
    """Gather the settings of one command line; the options are what click made of `setting_options`.

    Raises:
        ConfigError: As `load_settings`; also for a model that is named twice.
    """
    for name, resembling in unknown_variables(os.environ).items():
        hint = f"; did you mean {resembling}?" if resembling else ""
        click.echo(f"warning: {name} is not a variable that trio-llm reads{hint}", err=True)
    flags = flags_given(options)
    if model is not None:
        if "engine.model" in flags:
            raise click.UsageError(f"The model is named twice: {model} and --model {flags['engine.model'].value}.")
        if "server.served_model_name" in flags and "/" not in model and not Path(model).is_dir():
            hint = REPEAT.format(flag="--served-model-name")
            raise click.UsageError(f"{model} is read as MODEL, and is not a directory. {hint}")
        flags["engine.model"] = Given(model, "argument MODEL")
    return load_settings(config, os.environ, flags)


def flags_given(options: Mapping[str, Any]) -> dict[str, Given]:
    """Keep the settings that stood on the command line; an option that did not stand there is None or ()."""
    given: dict[str, Given] = {}
    for key, attribute in fields():
        value = options.get(key.replace(".", "__"))
        if value not in (None, ()):
            given[key] = Given(value, f"flag {attribute.metadata['flags'][0]}")
    if (dtype := given.get("engine.kv_cache_dtype")) is not None:  # also where a file says otherwise
        given.setdefault("engine.kv_quantization", Given(dtype.value == "int8", dtype.source))
    return given


def engine_settings_given(settings: Settings) -> dict[str, Any]:
    """Return the engine's settings that do not have their default, by their own names, as `LLM` takes them."""
    sources = {key.split(".")[1]: source for key, source in settings.sources.items() if key.startswith("engine.")}
    engine = attrs.asdict(settings.config.engine)
    return {name: engine[name] for name, source in sources.items() if source != "default"}
