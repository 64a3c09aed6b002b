"""Starts the actors, and ends the engine if one of them fails."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from functools import partial
from typing import Protocol

import attrs
import trio

from trio_llm.config import EngineConfig
from trio_llm.core.block_math import longest_sequence
from trio_llm.core.pace import StepPace
from trio_llm.core.setup import CoreSetup
from trio_llm.engine.actors import (
    SchedulerActor,
    manage_blocks,
)
from trio_llm.engine.admission import RequestLimits
from trio_llm.engine.engine import Engine
from trio_llm.engine.health import STALL_AFTER_S, Pulse
from trio_llm.engine.history import History
from trio_llm.engine.kv_events import hash_secret, kv_events_config, open_kv_events
from trio_llm.engine.live import Live
from trio_llm.engine.messages import Abort, Submit
from trio_llm.engine.metrics import Metrics
from trio_llm.engine.nursery import alone, open_nursery
from trio_llm.engine.recorder import open_recorder
from trio_llm.engine.speculation_metrics import SpeculationMetrics
from trio_llm.engine.step_pipeline import StepPipeline
from trio_llm.engine.step_thread import Begun, StepThread, Worker
from trio_llm.engine.tickets import Tickets
from trio_llm.errors import ConfigError, EngineDeadError
from trio_llm.messages import BlockAsk, BlockGrant, StepPlan, StepResult, StepTrace
from trio_llm.model_info import ModelInfo
from trio_llm.tokenizer import Tokenizer

Task = Callable[[], Awaitable[None]]
# Seconds that clients get to receive the error before cancellation. A guess.
LAST_WORDS_S = 1.0
_TRACED_STEPS = 1024
_log = logging.getLogger(__name__)


class Ranks(Protocol):
    """The other processes of a model."""

    def fileno(self) -> int:
        """Return a file descriptor that is readable once one of them has ended."""
        ...

    def failure(self) -> EngineDeadError:
        """Return which of them ended and why, and end all. Blocks for a moment; any thread may call it."""
        ...


class Runner(Protocol):
    """The model, as the engine sees it."""

    @property
    def info(self) -> ModelInfo: ...

    @property
    def ranks(self) -> Ranks | None: ...

    def launch(self, plan: StepPlan, begun: Begun, /) -> Callable[[], StepResult]:
        """Queue a plan's work on the device, in the order of the calls; return a function that waits for the result.

        It calls `begun` once the device has the plan's inputs, if that happens.

        The returned function queues no work, so another thread may call it while later plans are launched. If `launch`
        raises, the plan is the cause, and it may be launched again in parts. EngineDeadError, or any exception of the
        returned function, means that no plan can run again.
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

    If an actor fails, every open stream gets EngineDeadError, the block is cancelled, and this function raises the
    actor's exception. Leaving the block aborts open requests; call `drain` and `wait_idle` first to let them finish.

    Args:
        config: Only the settings of scheduling are read here.
        load: Makes the runner. Called on the model's thread, like its `launch` and `close`.
        tokenizer: The model's.
        worker: Runs the runner's calls. Default: a new thread.
        collector: Waits for results while `worker` launches the next step. Default: another new thread.
        model_name: Name of the model. Default: the runner's.
        stall_after_s: Seconds without a finished step after which `health` is "stalled". The first step has longer.
    Raises:
        ConfigError: `max_model_len` is more than the model or the KV cache allows; `record` or `kv_events_config`
            cannot be used.
    """
    kv_events_config(config)  # A mistake shows before the model is loaded.
    worker = StepThread() if worker is None else worker
    loaded: list[Runner] = []  # by the thread: a cancelled wait would lose what it returns
    try:
        await worker.run(lambda: loaded.append(load()))
        (runner,) = loaded
        info = runner.info if model_name is None else attrs.evolve(runner.info, name=model_name)
        config = config.decided(on_gpu=info.on_gpu)
        with closing(StepPipeline(runner.launch, worker, config.steps_in_flight, collector)) as pipeline:
            async with _serve(config, info, pipeline, runner.ranks, tokenizer, Pulse(stall_after_s)) as engine:
                yield engine
    finally:
        with trio.CancelScope(shield=True):
            for runner in loaded:
                await worker.run(runner.close)
        worker.close()


@asynccontextmanager
async def _serve(
    config: EngineConfig,
    info: ModelInfo,
    pipeline: StepPipeline,
    ranks: Ranks | None,
    tokenizer: Tokenizer,
    pulse: Pulse,
) -> AsyncGenerator[Engine, None]:
    setup = core_setup(config, info)
    info = attrs.evolve(info, max_model_len=setup.max_model_len)
    scheduler, blocks = setup.scheduler(), setup.block_manager(secret=hash_secret(config))
    tickets = Tickets(config.max_batch_size * (1 + config.max_waiting_batches))
    metrics = _metrics(config, setup, info)
    trace = deque[StepTrace](maxlen=_TRACED_STEPS)
    # Room for a Submit, a cancellation and an Abort per ticket, and for those of the request that held it before.
    send, inbox = trio.open_memory_channel[Submit | Abort](5 * tickets.limit)
    history = History(blocks, config.max_batch_size)
    limits = request_limits(config, info)
    # At most one ask or grant is in flight.
    send_ask, asks = trio.open_memory_channel[BlockAsk](1)
    send_grant, grants = trio.open_memory_channel[BlockGrant](1)
    depth, pace = config.steps_in_flight, _pace(config)
    live = Live(scheduler, blocks, history, metrics, pace, config.step_tokens, trace)
    with (
        open_recorder(config, info, setup, scheduler, blocks, metrics.registry) as recorder,
        open_kv_events(config, info, blocks, metrics.registry) as events,
    ):
        engine = Engine(info, tokenizer, limits, send, tickets, pulse, metrics, trace, history, live, recorder)
        watchers = [watcher for watcher in (history, recorder, events) if watcher is not None]
        actor = SchedulerActor(
            scheduler, inbox, tickets, pulse, trace, metrics.report, send_ask, grants, pipeline, depth, pace, watchers
        )
        tasks: list[Task] = [actor.run, partial(manage_blocks, blocks, asks, send_grant), pipeline.run, metrics.run]
        if ranks is not None:
            tasks.append(partial(_watch, ranks))
        async with open_nursery() as nursery:
            nursery.start_soon(_supervise, engine, tasks)
            yield engine
            nursery.cancel_scope.cancel()


async def _watch(ranks: Ranks) -> None:
    """Raise what a process of the model ended of."""
    await trio.lowlevel.wait_readable(ranks.fileno())
    failure = await trio.to_thread.run_sync(ranks.failure, abandon_on_cancel=True)
    await trio.lowlevel.checkpoint()  # The step that noticed it too may have raised meanwhile.
    raise failure


def _pace(config: EngineConfig) -> StepPace | None:
    return StepPace(config.target_step_s) if config.target_step_s else None


def core_setup(config: EngineConfig, info: ModelInfo) -> CoreSetup:
    """Return the sizes and policies of an engine with this model.

    Raises:
        ConfigError: `max_model_len` is more than the model or the KV cache allows.
    """
    longest = longest_sequence(info.num_kv_blocks - 1, info.kv_groups, config.max_tokens_in_flight)
    return CoreSetup(
        max_num_batched_tokens=config.step_tokens,
        max_batch_size=config.max_batch_size,
        max_model_len=_max_model_len(config, info, longest),
        eos_token_ids=info.eos_token_ids,
        scheduling_policy=config.scheduling_policy,
        long_prefill_token_threshold=config.long_prefill_token_threshold,
        num_kv_blocks=info.num_kv_blocks,
        groups=info.kv_groups,
        enable_prefix_caching=config.enable_prefix_caching,
        max_step_tokens=config.max_tokens_in_flight,
        lookup=(config.prompt_lookup_min, config.prompt_lookup_max) if config.spec_method == "ngram" else None,
        max_draft_tokens=0 if config.spec_method == "none" else config.max_draft_tokens,
        steps_in_flight=config.steps_in_flight,
        target_step_s=config.target_step_s,
    )


def _metrics(config: EngineConfig, setup: CoreSetup, info: ModelInfo) -> Metrics:
    metrics = Metrics(info, _cache_config(config))
    if setup.max_draft_tokens:
        metrics.step_watchers.append(SpeculationMetrics(metrics.registry, info, setup.max_draft_tokens).record)
    return metrics


def request_limits(config: EngineConfig, info: ModelInfo) -> RequestLimits:
    """Return what the model and the settings allow in a request."""
    return RequestLimits(
        max_model_len=info.max_model_len,
        vocab_size=info.vocab_size,
        hidden_size=info.hidden_size,
        max_logprobs=info.vocab_size if config.max_logprobs == -1 else config.max_logprobs,
    )


async def _supervise(engine: Engine, tasks: list[Task]) -> None:
    """Run the actors. If one fails, inform the engine's clients before their tasks are cancelled."""
    try:
        async with trio.open_nursery() as nursery:
            for task in tasks:
                nursery.start_soon(task)
    except BaseExceptionGroup as group:
        _, died = group.split(trio.Cancelled)
        if died is None:
            raise
        error = alone(died)
        _log.critical("an actor failed", exc_info=error)
        try:
            if engine.die(f"{type(error).__name__}: {error}"):
                await trio.sleep(LAST_WORDS_S)
        finally:  # Also if the block ends meanwhile: its end must not hide the cause.
            raise error from None
    finally:
        engine.die("The engine was closed.")


def _max_model_len(config: EngineConfig, info: ModelInfo, longest: int) -> int:
    """Return the maximum length of a sequence that the model, the KV cache and the settings allow."""
    if config.max_model_len is None:
        if longest < info.max_model_len:
            _log.warning(
                "%d KV blocks hold sequences of at most %d tokens, the model allows %d: longer requests are refused. "
                "--kv-blocks %d holds the longest.",
                info.num_kv_blocks,
                longest,
                info.max_model_len,
                1 + sum(-(-info.max_model_len // group.block_size) for group in info.kv_groups),
            )
        return min(info.max_model_len, longest)
    if config.max_model_len > info.max_model_len:
        raise ConfigError("max_model_len", config.max_model_len, "engine", f"at most {info.max_model_len}, the model's")
    if config.max_model_len > longest:
        allowed = f"at most {longest}, what {info.num_kv_blocks} KV blocks hold; raise num_kv_blocks (--kv-blocks)"
        raise ConfigError("max_model_len", config.max_model_len, "engine", allowed)
    return config.max_model_len


def _cache_config(config: EngineConfig) -> dict[str, object]:
    """Return the settings of the KV cache that vLLM's dashboards read, under vLLM's names."""
    return {
        "enable_prefix_caching": config.enable_prefix_caching,
        "cache_dtype": "int8" if config.kv_quantization and config.kv_cache_dtype == "auto" else config.kv_cache_dtype,
    }
