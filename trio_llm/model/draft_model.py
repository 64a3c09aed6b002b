"""From settings to a draft model: which checkpoint it is, whether it can work beside the model, and reading it.

A draft model needs the model's vocabulary, and a block table of the model's for each kind of its attention layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import attrs
import torch

from trio_llm.config import EngineConfig
from trio_llm.errors import ConfigError
from trio_llm.messages import KVGroup, Progress
from trio_llm.model.hub import resolve_draft
from trio_llm.model.kv_cache import KVLayout
from trio_llm.model.loader import Model, ModelPlan, inspect_model, load_model


@attrs.frozen(eq=False)
class DraftModel:
    """A draft model in memory.

    Attributes:
        groups: Which of the model's block tables each KV group of `layout` uses, as `borrow_groups` chose.
        most: Drafts of one row in a step.
    """

    model: Model
    layout: KVLayout
    groups: tuple[int, ...]
    most: int


@attrs.frozen(kw_only=True)
class DraftPlan:
    """A draft model that was checked but not read; `config` is the engine's with the draft as its model."""

    config: EngineConfig
    plan: ModelPlan
    groups: tuple[int, ...]

    def load(self, device: torch.device, report: Callable[[Progress], None] | None) -> DraftModel:
        """Read the weights."""
        loaded = load_model(self.config, self.plan.dtype, device, report)
        return DraftModel(loaded.model, loaded.kv_layout, self.groups, self.config.max_draft_tokens)


def inspect_draft(config: EngineConfig, model: ModelPlan) -> DraftPlan | None:
    """Check the draft model that the settings ask for; None where they ask for none.

    Raises:
        ConfigError: It cannot work beside the model; says why.
        CheckpointError, UnsupportedError: As `inspect_model` raises them.
    """
    if config.spec_method != "draft_model" or config.max_draft_tokens == 0:
        return None
    directory = resolve_draft(config.spec_model, model.directory)
    config = attrs.evolve(config, model=str(directory))
    plan = inspect_model(config)

    def refuse(reason: str) -> ConfigError:
        return ConfigError("spec_model", str(directory), "model", reason)

    ours, theirs = (of.config.text.get_int("vocab_size") for of in (model, plan))
    if ours != theirs:
        raise refuse(f"has a vocabulary of {theirs} tokens; it must be the model's, of {ours}")
    longest = config.max_model_len or model.max_model_len
    if plan.max_model_len < longest:
        raise refuse(f"was made for {plan.max_model_len} tokens of context; lower --max-model-len from {longest}")
    groups = borrow_groups(model.kv_layout.groups, plan.kv_layout.groups)
    if groups is None:
        raise refuse(
            f"attends over {_described(plan.kv_layout.groups)}; for each of these the model must have layers that see "
            f"at least as far in blocks of equal size, but it attends over {_described(model.kv_layout.groups)}"
        )
    return DraftPlan(config=config, plan=plan, groups=groups)


def borrow_groups(owned: Sequence[KVGroup], wanted: Sequence[KVGroup]) -> tuple[int, ...] | None:
    """Choose the model's block table that each KV group of its draft model uses, no table twice; None if there is none.

    A table serves whoever has blocks of the same size and sees no further back than its owner, whose blocks are freed
    when they leave its window.
    """
    chosen: list[int] = []
    for group in wanted:
        fitting = [at for at, owner in enumerate(owned) if at not in chosen and _serves(owner, group)]
        if not fitting:
            return None
        # The one with the shortest window: a longer one may be needed by a later group.
        chosen.append(min(fitting, key=lambda at: _window(owned[at])))
    return tuple(chosen)


def _serves(owner: KVGroup, group: KVGroup) -> bool:
    return owner.block_size == group.block_size and _window(group) <= _window(owner)


def _window(group: KVGroup) -> float:
    return float("inf") if group.window is None else group.window


def _described(groups: Sequence[KVGroup]) -> str:
    seen = ["all tokens" if group.window is None else f"a window of {group.window}" for group in groups]
    return " and ".join(f"{what} (blocks of {group.block_size})" for what, group in zip(seen, groups, strict=True))
