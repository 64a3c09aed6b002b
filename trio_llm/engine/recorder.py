"""Writes a record of every step, on a thread of its own.

The event loop makes a small frame of each call, while what is in it is in the processor's caches, and appends it to a
queue; the thread writes them. If it falls behind, calls are dropped and counted. Then a new file begins with the state
of the core, so that every file can be replayed exactly.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TypeVarTuple

import trio
from prometheus_client import CollectorRegistry, Counter

import trio_llm
from trio_llm.config import EngineConfig
from trio_llm.core.block_manager import BlockManager
from trio_llm.core.prefix import Chain
from trio_llm.core.scheduler import Scheduler
from trio_llm.core.setup import CoreSetup
from trio_llm.engine.messages import RequestStats
from trio_llm.errors import ConfigError
from trio_llm.messages import BlockAsk, BlockGrant, Commit, FinishReason, StepPlan, StepResult
from trio_llm.model_info import ModelInfo
from trio_llm.params import Submission
from trio_llm.replay.directory import RecordDirectory
from trio_llm.replay.encoder import Encoder, KeyEncoder
from trio_llm.replay.frames import Call, Frame, Header, decisions
from trio_llm.replay.state import State, capture

# Calls that wait to be written: many seconds of steps, in megabytes.
_MAX_CALLS = 4096
# How long calls are gathered before the thread writes them: waking up costs as much as writing dozens of them.
_GATHER_S = 0.25
_log = logging.getLogger(__name__)
Ts = TypeVarTuple("Ts")
# The arguments of `Encoder.planned`.
_Planned = tuple[int, float, int | None, tuple[int, ...], bytes]


class Recorder:
    """A `CoreWatcher` that records; see `open_recorder`.

    Args:
        files: Gets the frames.
        encoder: Makes those of calls.
        scheduler, blocks: The core, whose state begins each file but the first.
        counters: Of calls, of bytes, and of calls dropped.
    """

    def __init__(
        self,
        files: RecordDirectory,
        encoder: Encoder,
        scheduler: Scheduler,
        blocks: BlockManager,
        counters: tuple[Counter, Counter, Counter],
    ) -> None:
        self._files, self._encoder = files, encoder
        self._scheduler, self._blocks = scheduler, blocks
        self._num_calls, self._num_bytes, self._num_dropped = counters
        # Frames, and what the thread does between them.
        self._queue = deque[Call | partial[None]]()
        self._lost = False  # Calls were dropped, so the file cannot go on.
        # Whether calls are to be recorded, and whether some were not since a file began.
        self._on, self._paused = True, False
        self._broken = False  # No file can be written any more.
        self._waiting = False
        self._frames: list[Frame] = []  # To be written next.
        self._keys = KeyEncoder({})
        # Numbers of the last file that is full, and of the last one for which the state of the next was taken.
        self._full_file = self._left_file = 0
        self._wake, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="trio-llm-recorder", daemon=True)
        self._thread.start()

    @property
    def recording(self) -> bool:
        return self._on and not self._broken

    def record(self, on: bool) -> None:
        """Stop recording, or go on in a new file, from the next step."""
        self._paused = self._paused or not on
        self._on = on

    # --- in the scheduler actor's task ----------------------------------------------------------------------------

    def arrived(self, request_id: int, submission: Submission, at_s: float) -> None:
        self._put(self._encoder.arrived, request_id, submission, at_s)

    def left(self, request_id: int, reason: FinishReason, at_s: float) -> None:
        self._put(self._encoder.left, request_id, reason, at_s)

    def planned(
        self, at_s: float, prompt_tokens: int | None, ask: BlockAsk, grant: BlockGrant, plan: StepPlan | None
    ) -> None:
        if not self._on:
            return
        self._put(self._planned, at_s, prompt_tokens, ask, grant, plan)
        is_over = self._full_file > self._left_file or self._lost or self._paused
        if is_over and not self._broken and len(self._queue) < _MAX_CALLS // 2:
            state = capture(self._scheduler, self._blocks, tokens=self._encoder.tokens)
            chains = self._chains([sequence.request_id for sequence in state.blocks])
            self._left_file, self._lost, self._paused = self._full_file, False, False
            self._put(partial, self._begin_file, state, chains)

    def committed(self, at_s: float, result: StepResult, commit: Commit) -> None:
        self._put(self._encoder.committed, at_s, result, commit)

    def ended(self, stats: RequestStats) -> None:
        pass

    def _planned(
        self, at_s: float, prompt_tokens: int | None, ask: BlockAsk, grant: BlockGrant, plan: StepPlan | None
    ) -> partial[None]:
        # The checksum is left to the thread: its tables are in no cache here.
        columns = ask.step, at_s, prompt_tokens, ask.drafts, decisions(grant, plan)
        chains = self._chains([admit.request_id for admit in ask.admits]) if ask.admits else {}
        return partial(self._take_planned, columns, ask.released, chains)

    def _chains(self, request_ids: list[int]) -> dict[int, Chain]:
        chains = {request_id: self._blocks.chain(request_id) for request_id in request_ids}
        return {request_id: chain for request_id, chain in chains.items() if chain is not None}

    def _put(self, make: Callable[[*Ts], Call | partial[None]], *args: *Ts) -> None:
        if self._paused and not self._broken:
            return
        if self._broken or self._lost or len(self._queue) == _MAX_CALLS:
            self._lost = True
            self._num_dropped.inc()
            return
        self._queue.append(make(*args))
        if self._waiting:
            self._waiting = False
            self._wake.set()

    def close(self) -> None:
        """Write what is queued and end the thread."""
        self._closing.set()
        self._wake.set()
        self._thread.join()
        if self._broken:
            self._num_dropped.inc(len(self._queue))

    # --- in its thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._closing.is_set():
                self._waiting = True
                if not self._queue:
                    self._wake.wait()
                # Only now: what was queued or closed until here is seen below, and later wake-ups stay.
                self._wake.clear()
                self._closing.wait(_GATHER_S)
                self._write_all()
            self._write_all()
        except OSError as error:
            self._broken = True
            _log.error("recording ends: %s: %s", self._files.path, error.strerror or error)
        finally:
            with suppress(OSError):
                self._files.close()

    def _write_all(self) -> None:
        num_calls = len(self._queue)
        for _ in range(num_calls):
            match self._queue.popleft():
                case partial() as act:
                    act()
                case frame:
                    self._frames.append(frame)
        self._write()
        self._num_calls.inc(num_calls)

    def _write(self) -> None:
        frames = [*self._frames, *self._keys.new()]
        self._frames.clear()
        if frames:
            self._num_bytes.inc(self._files.write(frames))
        if self._files.full:
            self._full_file = self._files.number

    def _take_planned(self, columns: _Planned, released: Iterable[int], chains: Mapping[int, Chain]) -> None:
        self._frames += [self._encoder.planned(*columns), *self._keys.planned(released, chains)]

    def _begin_file(self, state: State, chains: Mapping[int, Chain]) -> None:
        self._write()
        self._num_bytes.inc(self._files.begin(state))
        self._keys = KeyEncoder(chains)


@contextmanager
def open_recorder(
    config: EngineConfig,
    info: ModelInfo,
    setup: CoreSetup,
    scheduler: Scheduler,
    blocks: BlockManager,
    registry: CollectorRegistry,
) -> Generator[Recorder | None, None, None]:
    """Record to `config.record` until the block ends; None if it is not set.

    Raises:
        ConfigError: The directory cannot be written.
    """
    if config.record is None:
        yield None
        return
    header = Header(trio_llm.__version__, info.name, time.time(), config.record_tokens, setup)
    encoder = Encoder(trio.current_time(), tokens=config.record_tokens, speculates=setup.max_draft_tokens > 0)
    try:
        files = RecordDirectory(Path(config.record), header, config.record_max_bytes)
        files.begin(None)
    except OSError as error:
        why = f"cannot be written: {error.strerror or error}"
        raise ConfigError("record", config.record, "engine", why) from None
    labels = {"model_name": info.name, "engine": "0"}

    def counter(name: str, meaning: str) -> Counter:
        return Counter(f"trio_llm:record_{name}", meaning, [*labels], registry=registry).labels(**labels)

    counters = (
        counter("calls", "Calls of the scheduler that were recorded."),
        counter("bytes", "Bytes of records written."),
        counter("dropped_calls", "Calls that are in no record, because writing was too slow or failed."),
    )
    recorder = Recorder(files, encoder, scheduler, blocks, counters)
    try:
        yield recorder
    finally:
        recorder.close()
