"""`trio-llm plan`: how many devices a model needs for a number of users, and what a smaller number costs."""

from __future__ import annotations

import json
import shlex
from typing import Any

import attrs
import click

from trio_llm.cli.settings import fields
from trio_llm.cli.show import columns
from trio_llm.config import EngineConfig
from trio_llm.model.capacity import Choice, Demand, choices

_GIB, _GB = 2**30, 1e9


def run(config: EngineConfig, demand: Demand, *, as_json: bool) -> None:
    """Print the choices: what each needs, and the command that starts it."""
    found = choices(config, demand)
    if as_json:
        rows = [_as_dict(config, demand, choice) for choice in found]
        click.echo(json.dumps({**attrs.asdict(demand), "model": config.model, "choices": rows}))
        return
    first = found[0]
    click.echo(first.budget.render())
    click.echo(f"\n{demand.users} users with {demand.context} tokens each: {_in_words(first, demand)}\n")
    click.echo(_table(found))
    for choice in found:
        click.echo(f"\n{choice.cost}:\n  {shlex.join(_command(config, demand, choice))}")


def _in_words(choice: Choice, demand: Demand) -> str:
    replicas = "1 device" if choice.devices == 1 else f"{choice.devices} devices with a replica of the model each"
    if choice.threads is None and (ranks := choice.budget.ranks) > 1:
        replicas = f"{choice.devices} GPUs, {ranks} for each replica of the model"
    words = [f"{replicas}, {choice.users} users and {choice.budget.num_kv_blocks} blocks on each"]
    if choice.threads is not None:
        words.append(f"threads: {choice.threads}")
    words.append(f"at most {choice.step_bytes / _GB:.2f} GB read in a step")
    if demand.rate:
        words.append(f"{demand.rate * choice.step_bytes / _GB:.1f} GB/s for {demand.rate:g} tokens a second each")
    return "; ".join(words)


def _table(found: list[Choice]) -> str:
    heads = ("CHOICE", "DEVICES", "USERS", "BLOCKS", "GIB", "GB A STEP", "TOKENS/S AT MOST")
    rows = [heads, *map(_cells, found)]
    return columns(rows if found[0].rate_bound is not None else [row[:-1] for row in rows])


def _cells(choice: Choice) -> tuple[str, ...]:
    memory, read = choice.budget.total_bytes / _GIB, choice.step_bytes / _GB
    counts = (choice.devices, choice.users, choice.budget.num_kv_blocks)
    return (choice.cost, *map(str, counts), f"{memory:.2f}", f"{read:.2f}", f"{choice.rate_bound or 0:.1f}")


def _command(config: EngineConfig, demand: Demand, choice: Choice) -> list[str]:
    """Return the command that serves a choice, with every engine setting that is not a default."""
    engine = attrs.evolve(
        config,
        **choice.settings,
        max_model_len=demand.context,
        max_batch_size=choice.users,
        num_kv_blocks=choice.budget.num_kv_blocks,
    )
    words = ["trio-llm", "serve"]
    for key, attribute in fields():
        section, name = key.split(".")
        value = getattr(engine, name) if section == "engine" else attribute.default
        if value == attribute.default:
            continue
        flag = attribute.metadata["flags"][0]
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag.removeprefix('--')}")
        else:
            words += [flag, str(value)]
    return words


def _as_dict(config: EngineConfig, demand: Demand, choice: Choice) -> dict[str, Any]:
    budget = choice.budget
    return {
        "choice": choice.cost,
        "command": _command(config, demand, choice),
        "devices": choice.devices,
        "users_per_device": choice.users,
        "threads": choice.threads,
        "num_kv_blocks": budget.num_kv_blocks,
        "weight_bytes": budget.weight_bytes,
        "kv_bytes": budget.kv_bytes,
        "workspace_bytes": budget.workspace_bytes,
        "draft_bytes": budget.draft_bytes,
        "loading_bytes": budget.loading_bytes,
        "total_bytes": budget.total_bytes,
        "available_bytes": budget.available_bytes,
        "step_bytes": choice.step_bytes,
        "rate_bound": choice.rate_bound,
    }
