"""The real scheduler, block manager and runner, stepped by hand: what the engine does, without the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import attrs
import torch

from trio_llm.core.block_manager import BlockManager
from trio_llm.core.scheduler import Scheduler
from trio_llm.core.speculator import Speculation
from trio_llm.errors import RequestFailedError
from trio_llm.messages import (
    Embedding,
    Event,
    Failed,
    PoolingParams,
    PromptLogprobs,
    SamplingParams,
    StepPlan,
    StepResult,
    TokenLogprobs,
    Tokens,
)
from trio_llm.model.kv_cache import LayerKV
from trio_llm.model.runner import Runner

Params = SamplingParams | PoolingParams


@attrs.define
class Answer:
    """All that one request was sent."""

    token_ids: list[int] = attrs.field(factory=list)
    logprobs: list[TokenLogprobs] = attrs.field(factory=list)
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    vector: tuple[float, ...] | None = None
    error: Exception | None = None

    def take(self, event: Event) -> None:
        """Take in one event."""
        match event:
            case Tokens(token_ids, logprobs):
                self.token_ids += token_ids
                self.logprobs += logprobs or ()
            case PromptLogprobs(entries):
                self.prompt_logprobs = entries
            case Embedding(vector):
                self.vector = vector
            case Failed(error):
                assert isinstance(error, RequestFailedError)
                self.error = error
            case _:
                pass


@attrs.define
class Outcome:
    """Answers in the order of the requests, and what the run went through."""

    answers: list[Answer]
    hit_tokens: int = 0
    num_preempted: int = 0
    num_steps: int = 0
    num_drafted: int = 0
    num_accepted: int = 0

    @property
    def token_ids(self) -> list[list[int]]:
        return [answer.token_ids for answer in self.answers]


def run(
    runner: Runner,
    requests: Sequence[tuple[Sequence[int], Params]],
    *,
    caching: bool = True,
    chunk: int = 0,
    batch_size: int = 16,
    num_blocks: int | None = None,
    repeat_steps: bool = False,
    watch: Callable[[BlockManager, StepPlan], None] | None = None,
    speculation: Speculation | None = None,
) -> Outcome:
    """Serve requests to their ends.

    Args:
        chunk: Most tokens of one row in a step, 0 for whole prompts.
        num_blocks: Fewer than the runner's pool forces preemption.
        repeat_steps: Run every step three times: as it is, then its rows in two halves, as recovery would; the
            halves' result counts.
        watch: Called after every step, before its result is committed.
    """
    blocks = BlockManager(
        num_blocks=num_blocks or runner.info.num_kv_blocks,
        groups=runner.info.kv_groups,
        enable_prefix_caching=caching,
        secret=b"secret",
        max_step_tokens=chunk or 2048,
    )
    scheduler = Scheduler(
        max_num_batched_tokens=2048,
        max_batch_size=batch_size,
        max_model_len=min(runner.info.max_model_len, blocks.max_tokens()),
        eos_token_ids=runner.info.eos_token_ids,
        long_prefill_token_threshold=chunk,
        speculation=speculation,
    )
    for request_id in list(runner._rows._row_of):  # of a run before: its last sequences were never dropped
        runner._drop(request_id)
    poison(runner)
    outcome = Outcome([Answer() for _ in requests])
    for request_id, (prompt, params) in enumerate(requests):
        scheduler.submit(request_id, prompt, params)
    while (ask := scheduler.ask()) is not None:
        grant = blocks.reserve(ask)
        outcome.hit_tokens += grant.stats.hit_tokens
        outcome.num_preempted += len(grant.preempted)
        plan = scheduler.plan(grant)
        if plan is None:
            continue
        outcome.num_steps += 1
        poison_new(runner, plan)
        result = runner.step(plan)
        if repeat_steps:
            result = in_halves(runner, plan)
        if watch is not None:
            watch(blocks, plan)
        commit = scheduler.commit(result)
        outcome.num_drafted += sum(commit.stats.drafted)
        outcome.num_accepted += sum(commit.stats.accepted)
        for request_id, event in commit.events:
            outcome.answers[request_id].take(event)
    return outcome


def least_blocks(runner: Runner, num_tokens: int, chunk: int) -> int:
    """Return the smallest pool in which one sequence of `num_tokens` fits."""
    num_blocks = 2
    while True:
        blocks = BlockManager(
            num_blocks=num_blocks, groups=runner.info.kv_groups, secret=b"secret", max_step_tokens=chunk
        )
        if blocks.max_tokens() >= num_tokens:
            return num_blocks
        num_blocks += 1


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
        reaches=plan.reaches[part],
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
