"""The process of a rank other than 0: it loads its part of the model and runs the layers as rank 0 tells it.

It knows rows, block tables and slots. Requests, sampling and everything else of a step are rank 0's.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import attrs
import numpy as np
import torch

from trio_llm.model.device.device import Capture, Device, Gpu
from trio_llm.model.load import find_kernels, open_device, record_decodes, set_threads
from trio_llm.model.loading.loader import LoadedModel, ModelPlan, inspect_model, load_model
from trio_llm.model.loading.pool_size import measure_room
from trio_llm.model.ops.dispatch import Dispatch, dispatching, mode_from_environment
from trio_llm.model.ops.matrices import keeps_integers
from trio_llm.model.paged.attention_batch import AttentionBatch, lay_out
from trio_llm.model.paged.kv_cache import KVCache
from trio_llm.model.parallel.group import RanksError
from trio_llm.model.parallel.messages import (
    Channel,
    Command,
    Decodes,
    Failed,
    Forward,
    Load,
    Loaded,
    Loading,
    Logits,
    Start,
)
from trio_llm.model.step.decode_graphs import DecodeGraphs, longest_context
from trio_llm.model.step.input_rows import BlockTables
from trio_llm.model_info import Progress

# <sys/prctl.h>
_PR_SET_PDEATHSIG = 1
_SIGN_OF_LIFE_S = 1.0


def main(socket_fd: int, parent_pid: int) -> int:
    """Follow rank 0, whose process started this one; return the exit code."""
    # A service manager signals all processes; rank 0 ends this one when it has drained.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # It died before the line above.
        return 1
    return serve(Channel(socket.socket(fileno=socket_fd), Command))


def serve(channel: Channel[Command]) -> int:
    """Follow rank 0, and tell it why if that is not possible; return the exit code."""
    try:
        follow(channel)
    except Exception as error:  # noqa: BLE001 - rank 0 reports it
        traceback.print_exc()
        with suppress(OSError):  # Rank 0 may have died.
            channel.send(Failed(type(error).__name__, str(error), isinstance(error, RanksError)))
        return 1
    return 0


def follow(channel: Channel[Command]) -> None:
    """Do what rank 0 says until it closes the channel."""
    load = channel.receive()
    if load is None:
        return
    assert isinstance(load, Load)
    config = load.config
    mode, device = mode_from_environment(), open_device(config, load.rank)
    alive = _SignsOfLife(channel)
    dispatch = Dispatch(mode, find_kernels(mode, device, alive.report), device.torch_device.type)
    keeps = dispatch.kernels.keeps if dispatch.kernels else keeps_integers
    plan = inspect_model(config, rank=load.rank, as_stored=load.as_stored, keeps=keeps)
    set_threads(config, device, dispatch.kernels, plan.weight_bytes)
    with device.working(), dispatching(dispatch), torch.inference_mode():
        loaded = load_model(plan, device.torch_device, alive.report)
        channel.send(Loaded())
        if channel.receive() is None:  # else it is Connect
            return
        on_gpu = isinstance(device, Gpu)
        plan.group.connect(load.meeting_place, config.distributed_timeout_s, device.torch_device, on_gpu=on_gpu)
        if isinstance(device, Gpu):
            channel.send(measure_room(loaded, config, device, dispatch))
        start = channel.receive()
        if start is None:
            return
        assert isinstance(start, Start)
        follower = Follower(loaded, plan, start, device, dispatch)
        if not config.enforce_eager:
            record_decodes(follower, device, dispatch, lambda _: None)
        while (command := channel.receive()) is not None:
            follower.obey(command)
        del follower
        plan.group.disconnect()
        plan.group.wait_disconnected(config.distributed_timeout_s)


@attrs.define(eq=False)
class _SignsOfLife:
    """Tells rank 0 now and then that loading goes on."""

    channel: Channel[Command]
    last_s: float = 0.0

    def report(self, _: Progress) -> None:
        if time.monotonic() - self.last_s > _SIGN_OF_LIFE_S:
            self.last_s = time.monotonic()
            self.channel.send(Loading())


class Follower:
    """A rank's part of the model, its KV pool and its graphs, and the block tables of all rows."""

    def __init__(self, loaded: LoadedModel, plan: ModelPlan, start: Start, device: Device, dispatch: Dispatch) -> None:
        self._model, self._layout, self._group, self._device = loaded.model, plan.kv_layout, plan.group, device
        self._kv = KVCache(self._layout, start.num_blocks, device.torch_device)
        rows = plan.engine.max_batch_size
        self._tables = BlockTables(rows, self._layout, start.max_model_len, device.torch_device)
        self._dtype, self._dispatch = plan.dtype, dispatch
        self._graphs = DecodeGraphs(
            self._model,
            self._kv,
            self._layout,
            self._tables.tables,
            self._tables.padding_row,
            self._empty(rows, 0, dtype=torch.float32),
            longest_context(self._layout.groups, start.num_blocks, start.max_model_len),
        )

    def capture_decodes(self, capture: Capture, report: Callable[[Progress], None]) -> None:
        """Capture small steps, at the same time as rank 0."""
        self._graphs.capture(capture, self._dispatch, report)

    def record_decodes(self, record: Capture) -> None:
        """Record such steps when rank 0 does."""
        self._graphs.record_when_needed(record, self._dispatch)

    def obey(self, command: Command) -> None:
        """Do one command."""
        match command:
            case Forward():
                self._forward(command)
            case Decodes(size, additions):
                self._write(additions)
                decodes = self._empty(3, size, dtype=torch.int64)
                self._group.broadcast(decodes)
                self._graphs.replay(decodes, self._dispatch)
            case Logits(num_rows):
                hidden = self._empty(num_rows, self._model.hidden_size, dtype=self._dtype)
                self._group.broadcast(hidden)
                self._model.logits(hidden)
            case _:
                raise AssertionError(f"unexpected {command!r}")
        self._dispatch.take()  # Rank 0 reports the same calls.

    def _forward(self, command: Forward) -> None:
        rows, starts, counts = (_column(data, np.int64) for data in (command.rows, command.starts, command.counts))
        *columns, index = self._device.send([*lay_out(starts, counts), rows])
        self._write(command.additions)
        token_ids = self._empty(int(counts.sum()), dtype=torch.int64)
        self._group.broadcast(token_ids)
        tables = self._tables.gather(index, int((starts + counts).max()))
        batch = AttentionBatch.of([token_ids, *columns], starts.tolist(), counts.tolist(), tables, self._layout)
        self._model.forward(batch, self._kv)

    def _write(self, additions: list[bytes]) -> None:
        """Write what a step adds to block tables."""
        if any(additions):
            kinds = [np.int64, np.int32] * len(self._layout.groups)
            columns = [_column(data, kind) for data, kind in zip(additions, kinds, strict=True)]
            self._tables.write(self._device.send(columns))

    def _empty(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self._device.torch_device)


def _column(data: bytes, dtype: Any) -> Any:
    """Return a column as an array that may be written to, as torch demands."""
    return np.frombuffer(data, dtype).copy()


if __name__ == "__main__":
    code = main(int(sys.argv[1]), int(sys.argv[2]))
    # Not sys.exit: that waits for a GPU, which may wait for ranks that have ended.
    os._exit(code)
