"""Starts the actors round a runner and a core, and decides what happens when one of them dies."""

from __future__ import annotations

import logging
import secrets
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Protocol

import attrs
import trio

from trio_llm.config import EngineConfig
from trio_llm.core.block_manager import BlockManager
from trio_llm.core.scheduler import Scheduler
from trio_llm.core.speculate import LookupSizes
from trio_llm.core.speculator import Speculation
from trio_llm.engine.actors import (
    MAX_STEPS_IN_FLIGHT,
    Asks,
    Grants,
    Plans,
    Results,
    SchedulerActor,
    Wait,
    manage_blocks,
    run_model,
)
from trio_llm.engine.admission import Limits
from trio_llm.engine.engine import Engine
from trio_llm.engine.health import Pulse
from trio_llm.engine.messages import Abort, Submit
from trio_llm.engine.metrics import Metrics
from trio_llm.engine.nursery import alone, open_nursery
from trio_llm.engine.recovery import Collect, Launch, launch_step
from trio_llm.engine.speculation_metrics import SpeculationMetrics
from trio_llm.engine.step_thread import StepThread, Worker
from trio_llm.engine.tickets import Tickets
from trio_llm.errors import ConfigError
from trio_llm.messages import BlockAsk, BlockGrant, ModelInfo, StepPlan, StepResult, StepTrace
from trio_llm.tokenizer import Tokenizer

Task = Callable[[], Awaitable[None]]
# How long those who read get to pass on the engine's death before what they run in is cancelled. Out of the air.
LAST_WORDS_S = 1.0
# Without a finished step for so long, work that exists counts as stuck. Out of the air: above any step we have seen.
STALL_AFTER_S = 60.0
_TRACED_STEPS = 1024
_log = logging.getLogger(__name__)


class Runner(Protocol):
    """The model, as this floor knows it."""

    @property
    def info(self) -> ModelInfo: ...

    def launch(self, plan: StepPlan, /) -> Callable[[], StepResult]:
        """Queue one plan's work on the device, in the order of the calls; return what waits for its result.

        What is returned queues nothing, so it may be called on another thread, while later plans are launched. Of an
        exception from here the plan is the cause, and it may be launched again in parts; EngineDeadError says that no
        plan can ever run again, as does whatever is raised by waiting.
        """
        ...

    def close(self) -> None: ...


@asynccontextmanager
async def run_engine(
    config: EngineConfig,
    load: Callable[[], Runner],
    tokenizer: Tokenizer,
    *,
    worker: Worker | None = None,
    collector: Worker | None = None,
    model_name: str | None = None,
    stall_after_s: float = STALL_AFTER_S,
) -> AsyncGenerator[Engine, None]:
    """Load the model on its thread, start the actors and serve until the block ends.

    When an actor dies, every open stream gets EngineDeadError, the block is cancelled and the actor's exception is
    raised from here. Leaving the block aborts what still runs; call `drain` and `wait_idle` first where that matters.

    Args:
        config: Only what concerns scheduling is read here.
        load: Makes the runner; called on the model's thread, as are its `launch` and `close`.
        tokenizer: The model's.
        worker: Runs the runner's calls; default: a thread of its own.
        collector: Waits for results while `worker` launches the next step; default: one more thread.
        model_name: What the model is called; default: as the runner calls it.
        stall_after_s: From when on `health` says "stalled".
    Raises:
        ConfigError: `max_model_len` is more than the model or the KV pool can hold.
    """
    worker = StepThread() if worker is None else worker
    try:
        runner = await worker.run(load)
        try:
            info = runner.info if model_name is None else attrs.evolve(runner.info, name=model_name)
            config = config.decided(on_gpu=info.on_gpu)
            with _stepping(runner.launch, worker, collector, config.steps_in_flight) as post:
                async with _serve(config, info, post, tokenizer, stall_after_s) as engine:
                    yield engine
        finally:
            with trio.CancelScope(shield=True):
                await worker.run(runner.close)
    finally:
        worker.close()


@contextmanager
def _stepping(
    launch: Launch, worker: Worker, collector: Worker | None, depth: int
) -> Generator[Callable[[StepPlan], Wait], None, None]:
    """Yield what posts a plan to the model's thread; no recovery lets a later plan overtake it."""
    if depth == 1:
        yield lambda plan: worker.post(_step, plan, launch)
        return
    waiter = StepThread("trio-llm-collector") if collector is None else collector

    def post(plan: StepPlan) -> Wait:
        launched = worker.post(launch_step, plan, launch)
        return partial(_collect, launched, waiter)

    try:
        yield post
    finally:
        waiter.close()


def _step(plan: StepPlan, launch: Launch) -> StepResult:
    return launch_step(plan, launch)()


async def _collect(launched: Callable[[], Awaitable[Collect]], waiter: Worker) -> StepResult:
    return await waiter.run(await launched())


@asynccontextmanager
async def _serve(
    config: EngineConfig,
    info: ModelInfo,
    post: Callable[[StepPlan], Wait],
    tokenizer: Tokenizer,
    stall_after_s: float,
) -> AsyncGenerator[Engine, None]:
    blocks = BlockManager(
        num_blocks=info.num_kv_blocks,
        groups=info.kv_groups,
        enable_prefix_caching=config.enable_prefix_caching,
        secret=secrets.token_bytes(32),
        max_step_tokens=config.max_tokens_in_flight,
    )
    info = attrs.evolve(info, max_model_len=_max_model_len(config, info, blocks.max_tokens()))
    scheduler = Scheduler(
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_batch_size=config.max_batch_size,
        max_model_len=info.max_model_len,
        eos_token_ids=info.eos_token_ids,
        policy=config.scheduling_policy,
        long_prefill_token_threshold=config.long_prefill_token_threshold,
        speculation=_speculation(config),
    )
    tickets = Tickets(config.max_batch_size * (1 + config.max_waiting_batches))
    pulse, metrics = Pulse(), _metrics(config, info)
    trace = deque[StepTrace](maxlen=_TRACED_STEPS)
    # Room for a Submit and an Abort per ticket, and for an Abort of whoever held it before.
    send, inbox = trio.open_memory_channel[Submit | Abort](3 * tickets.limit)
    engine = Engine(info, tokenizer, _limits(config, info), send, tickets, pulse, metrics, trace, stall_after_s)
    wire = partial(
        SchedulerActor, scheduler, inbox, tickets, pulse, trace, metrics.report, depth=config.steps_in_flight
    )
    tasks = [*_actors(wire, blocks, post), metrics.run]
    async with open_nursery() as nursery:
        nursery.start_soon(_supervise, engine, tasks)
        yield engine
        nursery.cancel_scope.cancel()


def _speculation(config: EngineConfig) -> Speculation | None:
    if config.spec_method == "none" or config.max_draft_tokens == 0:
        return None
    sizes = LookupSizes(config.prompt_lookup_min, config.prompt_lookup_max)
    return Speculation(config.max_draft_tokens, sizes if config.spec_method == "ngram" else None)


def _metrics(config: EngineConfig, info: ModelInfo) -> Metrics:
    metrics = Metrics(info, _cache_config(config))
    if (speculation := _speculation(config)) is not None:
        metrics.step_watchers.append(SpeculationMetrics(metrics.registry, info, speculation.most).record)
    return metrics


def _limits(config: EngineConfig, info: ModelInfo) -> Limits:
    return Limits(
        max_model_len=info.max_model_len,
        vocab_size=info.vocab_size,
        hidden_size=info.hidden_size,
        max_logprobs=info.vocab_size if config.max_logprobs == -1 else config.max_logprobs,
    )


def _actors(
    scheduler: Callable[[Asks, Grants, Plans, Results], SchedulerActor],
    blocks: BlockManager,
    post: Callable[[StepPlan], Wait],
) -> list[Task]:
    """Join the scheduler to the KV manager and the model runner. A message per step in flight is on each edge."""
    send_ask, asks = trio.open_memory_channel[BlockAsk](1)
    send_grant, grants = trio.open_memory_channel[BlockGrant](1)
    send_plan, plans = trio.open_memory_channel[StepPlan](MAX_STEPS_IN_FLIGHT)
    send_result, results = trio.open_memory_channel[StepResult](MAX_STEPS_IN_FLIGHT)
    return [
        scheduler(send_ask, grants, send_plan, results).run,
        partial(manage_blocks, blocks, asks, send_grant),
        partial(run_model, post, plans, send_result),
    ]


async def _supervise(engine: Engine, tasks: list[Task]) -> None:
    """Run the actors; when one dies, tell the engine's clients before what they run in is cancelled."""
    try:
        async with trio.open_nursery() as nursery:
            for task in tasks:
                nursery.start_soon(task)
    except BaseExceptionGroup as group:
        _, died = group.split(trio.Cancelled)
        if died is None:
            raise
        error = alone(died)
        _log.critical("an actor died", exc_info=error)
        try:
            if engine.die(f"{type(error).__name__}: {error}"):
                await trio.sleep(LAST_WORDS_S)
        finally:  # Also when the block ends meanwhile: its end must not hide why.
            raise error from None
    finally:
        engine.die("The engine was closed.")


def _max_model_len(config: EngineConfig, info: ModelInfo, longest: int) -> int:
    """Return the longest sequence to accept: what the model, the pool and the user allow."""
    if config.max_model_len is None:
        return min(info.max_model_len, longest)
    if config.max_model_len > info.max_model_len:
        raise ConfigError("max_model_len", config.max_model_len, "engine", f"at most {info.max_model_len}, the model's")
    if config.max_model_len > longest:
        allowed = f"at most {longest}, what {info.num_kv_blocks} KV blocks hold; raise num_kv_blocks (--kv-blocks)"
        raise ConfigError("max_model_len", config.max_model_len, "engine", allowed)
    return config.max_model_len


def _cache_config(config: EngineConfig) -> dict[str, object]:
    """Return what vLLM's boards read of the KV cache's settings, under its names."""
    return {
        "enable_prefix_caching": config.enable_prefix_caching,
        "cache_dtype": "int8" if config.kv_quantization else "auto",
    }
