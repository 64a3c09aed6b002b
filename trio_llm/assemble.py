"""The composition root: it connects the core, the model and the engine."""

from __future__ import annotations

import gc
import sys
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager, nullcontext

import trio

from trio_llm.config import Config
from trio_llm.engine.engine import Engine
from trio_llm.engine.step_thread import StepThread
from trio_llm.engine.supervisor import Runner, run_engine
from trio_llm.model.checkpoint.hub import resolve_tokenizer
from trio_llm.model_info import Progress
from trio_llm.tokenizer import Tokenizer


@asynccontextmanager
async def open_engine(
    config: Config | None = None,
    *,
    report: Callable[[Progress], None] | None = None,
    tune_interpreter: bool = False,
) -> AsyncGenerator[Engine, None]:
    """Load a model and serve it until the block ends; several engines may follow one another in a process.

    When a part of the engine dies, every open stream gets EngineDeadError, the block is cancelled and the part's
    exception is raised from here. Leaving the block aborts what still runs.

    Args:
        config: Default: the demo model with all defaults.
        report: Called with the progress of loading, on the model's thread.
        tune_interpreter: Set up garbage collection and thread switching for serving, for the whole process.

    Raises:
        CheckpointError: The model's files are damaged or do not fit together.
        UnsupportedError: A feature that is not supported; names it.
        ConfigError: Settings that do not fit the model or the machine.
    """
    config = Config() if config is None else config
    directory = await trio.to_thread.run_sync(resolve_tokenizer, config.engine)
    tokenizer = await trio.to_thread.run_sync(Tokenizer.from_directory, directory)
    worker = StepThread()

    def report_unless_cancelled(progress: Progress) -> None:
        if worker.cancelled:
            raise _LoadingCancelledError
        if report is not None:
            report(progress)

    def load() -> Runner:
        from trio_llm.model.load import load_runner

        if tune_interpreter:
            gc.freeze()  # The imports: else the collection after loading walks all of them, a twentieth of the start.
        return load_runner(config.engine, report_unless_cancelled, eos_token_id=tokenizer.eos_token_id)

    name = next(iter(config.server.served_model_name), None)
    async with run_engine(config.engine, load, tokenizer, worker=worker, model_name=name) as engine:
        with tuned_interpreter() if tune_interpreter else nullcontext():
            yield engine


@contextmanager
def tuned_interpreter() -> Generator[None, None, None]:
    """Make garbage collection rare and thread switches prompt, while serving.

    Objects that are alive now live as long as the server: freezing them saves collections (15 to 25 % of the CPU time
    of many streams, measured). A step's Python must not wait 5 ms for the event loop's thread to release the GIL.
    """
    thresholds, interval_s = gc.get_threshold(), sys.getswitchinterval()
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    sys.setswitchinterval(1e-4)
    try:
        yield
    finally:
        sys.setswitchinterval(interval_s)
        gc.set_threshold(*thresholds)
        gc.unfreeze()


class _LoadingCancelledError(Exception):
    """Ends loading. Nothing catches it, because the waiting task was cancelled."""
