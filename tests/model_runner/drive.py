"""Runs of the real scheduler, block manager and runner on memory that shows what is read before it is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import torch

from trio_llm.messages import StepPlan, StepResult
from trio_llm.model.paged.kv_cache import LayerKV
from trio_llm.model.runner import Runner
from trio_llm.verify import drive
from trio_llm.verify.drive import Answer, Outcome, Params, least_blocks

__all__ = ["Answer", "Outcome", "Params", "in_halves", "least_blocks", "poison", "run"]


def run(
    runner: Runner, requests: Sequence[tuple[Sequence[int], Params]], *, repeat_steps: bool = False, **settings: Any
) -> Outcome:
    """Serve requests to their ends, see `trio_llm.verify.drive.run`; blocks are poisoned before a step first uses them.

    Args:
        repeat_steps: Run every step three times: as it is, then its rows in two halves, as recovery would; the
            halves' result counts.
    """

    def step(plan: StepPlan) -> StepResult:
        poison_new(runner, plan)
        result = runner.step(plan)
        return in_halves(runner, plan) if repeat_steps else result

    poison(runner)
    return drive.run(runner, requests, step=step, **settings)


def in_halves(runner: Runner, plan: StepPlan) -> StepResult:
    """Run the rows of a plan that was applied before in two halves, nothing dropped, admitted or added again."""
    if len(plan.request_ids) == 1:
        return runner.step(rows_of(plan, slice(None)))
    middle = len(plan.request_ids) // 2
    first, second = (runner.step(rows_of(plan, part)) for part in (slice(0, middle), slice(middle, None)))
    logprobs = [*(first.logprobs or [None] * middle), *(second.logprobs or [None] * len(second.token_ids))]
    return StepResult(
        plan.step,
        first.token_ids + second.token_ids,
        tuple(logprobs) if any(logprobs) else None,
        {**(first.prompt_logprobs or {}), **(second.prompt_logprobs or {})} or None,
        {**(first.embeddings or {}), **(second.embeddings or {})} or None,
        {**first.failed, **second.failed},
        drafts=None if first.drafts is None or second.drafts is None else first.drafts + second.drafts,
    )


def rows_of(plan: StepPlan, part: slice) -> StepPlan:
    """Cut a plan to some of its rows."""
    ends = [sum(plan.counts[:i]) for i in range(len(plan.counts) + 1)]
    first, last, _ = part.indices(len(plan.counts))
    return attrs.evolve(
        plan,
        dropped=(),
        admitted=(),
        new_blocks=((),) * (last - first),
        request_ids=plan.request_ids[part],
        starts=plan.starts[part],
        counts=plan.counts[part],
        samples=plan.samples[part],
        drafts=plan.drafts[part],
        draft_limits=plan.draft_limits[part],
        token_ids=plan.token_ids[ends[first] : ends[last]],
    )


def poison(runner: Runner) -> None:
    """Fill the pool with NaN, so that reading a slot before it is written shows."""
    for layers in _layers_of_groups(runner):
        for layer in layers:
            _poison(layer, slice(None))


def poison_new(runner: Runner, plan: StepPlan) -> None:
    """Do the same to the blocks that a step appends: what their last owner left in them must not be read.

    Blocks before a row's start were hit in the prefix cache and hold what the row reads.
    """
    layers = _layers_of_groups(runner)
    for start, additions in zip(plan.starts, plan.new_blocks, strict=True):
        for index, (first, blocks) in enumerate(additions):
            size = runner.info.kv_groups[index].block_size
            for block in blocks[max(0, start // size - first) :]:
                for layer in layers[index]:
                    _poison(layer, slice(block * size, (block + 1) * size))


def _layers_of_groups(runner: Runner) -> list[list[LayerKV]]:
    """Return what the blocks of each group hold, of the model and of its draft model."""
    layers = [[layer for layer in runner._kv.layers if layer.group == at] for at in range(len(runner.info.kv_groups))]
    if runner._drafter is not None:
        for layer in runner._drafter._kv.layers:
            layers[runner._drafter._draft.groups[layer.group]].append(layer)
    return layers


def _poison(layer: LayerKV, slots: slice) -> None:
    for values, scales in ((layer.k, layer.k_scale), (layer.v, layer.v_scale)):
        (values if scales is None else scales)[slots] = torch.nan
