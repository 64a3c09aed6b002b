"""Ranks on GPUs that are pretended: tapes stand for CUDA graphs, and gloo for NCCL, with NCCL's manners.

A collective that is called while a graph is captured is on its tape. One that fails on rank 0 never ends: it leaves
the queue stuck, where marks do not pass, until the communicator is aborted. Other ranks fail then: a thread cannot be
killed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import perf_counter
from typing import Any

import attrs
import pytest
import torch

from tests.model_runner import static_ops, tape
from tests.model_runner.test_gpu_loading import GIB, PretendedGpu
from trio_llm.config import EngineConfig
from trio_llm.model import load, rank
from trio_llm.model.device.device import Mark
from trio_llm.model.ops import torch_attention as attention_torch
from trio_llm.model.ops import torch_reference as ops_torch
from trio_llm.model.parallel import group

# A wait of the tests' own that must not end the test by hanging.
PATIENCE_S = 60.0
__all__ = ["GIB", "Communicator", "RankGpu", "pretend"]
_here = threading.local()  # the GPU of a rank, which is a thread or a process


@attrs.define(eq=False)
class Communicator:
    """gloo, as NCCL behaves. Its collectives return None at once, whatever becomes of them."""

    gloo: Any
    rank: int
    stuck: bool = False
    aborted: threading.Event = attrs.field(factory=threading.Event)

    def allreduce(self, *args: Any) -> None:
        self._queue(lambda: self.gloo.allreduce(*args).wait())

    def broadcast(self, *args: Any) -> None:
        self._queue(lambda: self.gloo.broadcast(*args).wait())

    def gather(self, *args: Any) -> None:
        self._queue(lambda: self.gloo.gather(*args).wait())

    def abort(self) -> None:
        self.gloo = None  # The others' collectives fail.
        self.aborted.set()

    def _queue(self, collective: Callable[[], object]) -> None:
        if self.aborted.is_set():
            raise RuntimeError("NCCL communicator was aborted")

        def run() -> None:
            try:
                if not self.stuck:
                    collective()
            except RuntimeError:  # A rank has died, or was silent for gloo's timeout.
                if self.rank:
                    raise
                self.stuck = True

        tape.call(run)


@attrs.frozen
class _Mark:
    at_s: float
    behind: Communicator | None  # what the queue is stuck in

    def wait(self) -> None:
        if self.behind is not None:
            assert self.behind.aborted.wait(PATIENCE_S), "nobody aborts what this waits for"

    def has_passed(self) -> bool:
        return self.behind is None or self.behind.aborted.is_set()

    def seconds_since(self, earlier: Mark) -> float:
        assert isinstance(earlier, _Mark)
        return self.at_s - earlier.at_s


@attrs.define(eq=False)
class RankGpu(PretendedGpu):
    """A rank's GPU, and how it reaches the others."""

    communicator: Communicator | None = None

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        return self.tapes.capture_operations(work)

    def peak_bytes(self, work: Callable[[], object]) -> int:
        peak = super().peak_bytes(work)
        self.mark().wait()
        return peak

    def mark(self) -> Mark:
        stuck = self.communicator is not None and self.communicator.stuck
        return _Mark(perf_counter(), self.communicator if stuck else None)


def _attention(q: torch.Tensor, batch: Any, *args: Any) -> torch.Tensor:
    return (_REAL_ATTENTION if batch.counts else static_ops.paged_attention)(q, batch, *args)


_REAL_ATTENTION = attention_torch.paged_attention


def pretend(patch: pytest.MonkeyPatch, gpus: list[RankGpu]) -> None:
    """Give every rank of this process, by its number, one of these GPUs."""

    def open_device(_: EngineConfig, number: int = 0) -> RankGpu:
        _here.gpu = gpus[number]
        return _here.gpu

    def nccl(store: Any, number: int, *args: Any) -> Communicator:
        _here.gpu.communicator = Communicator(gloo(store, number, *args), number)
        return _here.gpu.communicator

    gloo = group._gloo
    patch.setenv("TRIO_LLM_KERNELS", "reference")
    patch.setattr(load, "open_device", open_device)
    patch.setattr(rank, "open_device", open_device)
    patch.setattr(group, "_nccl", nccl)
    patch.setattr(attention_torch, "paged_attention", _attention)
    patch.setattr(ops_torch, "moe", static_ops.moe)
