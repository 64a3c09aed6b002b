"""The real scheduler, block manager and runner, stepped by hand: what the engine does, without the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import attrs

from trio_llm.core.block_manager import BlockManager
from trio_llm.core.scheduler import Scheduler
from trio_llm.core.speculation import Speculation
from trio_llm.messages import Embedding, Event, Failed, PromptLogprobs, StepPlan, StepResult, TokenLogprobs, Tokens
from trio_llm.model.runner import Runner
from trio_llm.params import PoolingParams, SamplingParams, Submission

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
        """The tokens of each answer."""
        return [answer.token_ids for answer in self.answers]


def run(
    runner: Runner,
    requests: Sequence[tuple[Sequence[int], Params]],
    *,
    caching: bool = True,
    chunk: int = 0,
    batch_size: int = 16,
    num_blocks: int | None = None,
    speculation: Speculation | None = None,
    step: Callable[[StepPlan], StepResult] | None = None,
    watch: Callable[[BlockManager, StepPlan], None] | None = None,
) -> Outcome:
    """Serve requests to their ends.

    Args:
        chunk: Most tokens of one row in a step, 0 for whole prompts.
        num_blocks: Fewer than the runner's pool forces preemption.
        step: Runs a plan; default: the runner.
        watch: Called after every step, before its result is committed.
    """
    blocks, scheduler = _make_core(runner, caching, chunk, batch_size, num_blocks, speculation)
    runner.drop_all()  # the last sequences of a run before were never dropped
    outcome = Outcome([Answer() for _ in requests])
    for request_id, (prompt, params) in enumerate(requests):
        scheduler.submit(request_id, Submission(prompt, params))
    while (ask := scheduler.ask()) is not None:
        grant = blocks.reserve(ask)
        outcome.hit_tokens += grant.stats.hit_tokens
        outcome.num_preempted += len(grant.preempted)
        plan = scheduler.plan(grant)
        if plan is None:
            continue
        outcome.num_steps += 1
        result = (step or runner.step)(plan)
        if watch is not None:
            watch(blocks, plan)
        commit = scheduler.commit(result)
        outcome.num_drafted += sum(commit.stats.drafted)
        outcome.num_accepted += sum(commit.stats.accepted)
        for request_id, event in commit.events:
            outcome.answers[request_id].take(event)
    return outcome


def _make_core(
    runner: Runner, caching: bool, chunk: int, batch_size: int, num_blocks: int | None, speculation: Speculation | None
) -> tuple[BlockManager, Scheduler]:
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
    return blocks, scheduler


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
