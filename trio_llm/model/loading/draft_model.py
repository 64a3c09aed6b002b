"""From settings to a draft model: find its checkpoint, check it against the model, and read it.

A draft model needs the model's vocabulary and, for each kind of its attention layers, one of the model's block tables.
Rank 0 has all of it: it is small, so its collectives would take longer than what they divide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import attrs
import torch

from trio_llm.config import EngineConfig
from trio_llm.errors import ConfigError
from trio_llm.model.checkpoint.hub import resolve_draft
from trio_llm.model.loading.loader import Model, ModelPlan, inspect_model, load_model
from trio_llm.model.paged.kv_cache import KVLayout
from trio_llm.model_info import KVGroup, Progress


@attrs.frozen(eq=False)
class DraftModel:
    """A draft model in memory.

    Attributes:
        groups: Index of the model's block table for each KV group of `layout`, from `borrow_groups`.
        max_drafts: Drafts of one row in a step.
    """

    model: Model
    layout: KVLayout
    groups: tuple[int, ...]
    max_drafts: int


@attrs.frozen(kw_only=True)
class DraftPlan:
    """A checked draft model whose weights are not read yet."""

    plan: ModelPlan
    groups: tuple[int, ...]

    def load(self, device: torch.device, report: Callable[[Progress], None] | None) -> DraftModel:
        """Read the weights."""
        loaded = load_model(self.plan, device, report)
        return DraftModel(loaded.model, loaded.kv_layout, self.groups, self.plan.engine.max_draft_tokens)


def inspect_draft(config: EngineConfig, model: ModelPlan) -> DraftPlan | None:
    """Check the draft model that the settings name; return None if they name none.

    Raises:
        ConfigError: It does not fit the model; says why.
        CheckpointError, UnsupportedError: See `inspect_model`.
    """
    if config.spec_method != "draft_model" or config.max_draft_tokens == 0:
        return None
    directory = resolve_draft(config.spec_model, model.path)
    alone = attrs.evolve(config, model=str(directory), revision=None, tensor_parallel_size=1)
    plan = inspect_model(alone, as_stored=model.as_stored, keeps=model.keeps)

    def refuse(reason: str) -> ConfigError:
        return ConfigError("spec_model", str(directory), "model", reason)

    ours, theirs = (of.config.text.get_int("vocab_size") for of in (model, plan))
    if ours != theirs:
        raise refuse(f"has a vocabulary of {theirs} tokens; it must be the model's vocabulary of {ours}")
    longest = config.max_model_len or model.max_model_len
    if plan.max_model_len < longest:
        raise refuse(f"was made for {plan.max_model_len} tokens of context; lower --max-model-len from {longest}")
    groups = borrow_groups(model.kv_layout.groups, plan.kv_layout.groups)
    if groups is None:
        raise refuse(
            f"attends over {_described(plan.kv_layout.groups)}; for each of these the model must have layers that see "
            f"at least as far in blocks of equal size, but it attends over {_described(model.kv_layout.groups)}"
        )
    return DraftPlan(plan=plan, groups=groups)


def borrow_groups(owned: Sequence[KVGroup], wanted: Sequence[KVGroup]) -> tuple[int, ...] | None:
    """Choose a block table of the model for each KV group of the draft model, each at most once; None if impossible.

    A table fits a group with blocks of the same size that attends no further back than the table's owner: blocks are
    freed when they leave the owner's window.
    """
    chosen: list[int] = []
    for group in wanted:
        fitting = [at for at, owner in enumerate(owned) if at not in chosen and _serves(owner, group)]
        if not fitting:
            return None
        # The shortest window that fits: a later group may need a longer one.
        chosen.append(min(fitting, key=lambda at: _window(owned[at])))
    return tuple(chosen)


def _serves(owner: KVGroup, group: KVGroup) -> bool:
    return owner.block_size == group.block_size and _window(group) <= _window(owner)


def _window(group: KVGroup) -> float:
    return float("inf") if group.window is None else group.window


def _described(groups: Sequence[KVGroup]) -> str:
    seen = ["all tokens" if group.window is None else f"a window of {group.window}" for group in groups]
    return " and ".join(f"{what} (blocks of {group.block_size})" for what, group in zip(seen, groups, strict=True))
