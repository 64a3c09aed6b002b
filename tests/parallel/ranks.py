"""A model split among ranks that are threads of the test: real collectives, without the start of processes."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from tests.model.paged import CPU, Paged
from trio_llm.config import EngineConfig
from trio_llm.model.loading.loader import LoadedModel, inspect_model, load_model
from trio_llm.model.parallel.group import Group
from trio_llm.model.parallel.messages import Channel, Command
from trio_llm.model.rank import serve

T = TypeVar("T")
TIMEOUT_S = 60


def in_ranks(size: int, meeting_place: Path, work: Callable[[Group], T]) -> list[T]:
    """Call `work` with each rank's group, every one in a thread of its own; return what the ranks return."""
    ready = threading.Barrier(size)

    def rank(number: int) -> T:
        group = Group(number, size)
        ready.wait(TIMEOUT_S)
        group.connect(str(meeting_place), TIMEOUT_S, CPU)
        return work(group)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(rank, range(size)))


def load_part(directory: Path, group: Group, *, as_stored: bool = False, **settings: Any) -> LoadedModel:
    """Load one rank's part of a checkpoint, with a group that may be connected."""
    config = EngineConfig(model=str(directory), block_size=4, tensor_parallel_size=group.size, **settings)
    plan = inspect_model(config, rank=group.rank, as_stored=as_stored)
    plan.group.__dict__.update(group.__dict__)
    return load_model(plan, CPU)


def split_logits(
    directory: Path, size: int, meeting_place: Path, prompts: Sequence[Sequence[int]], chunk: int, **settings: Any
) -> Tensor:
    """Return the logits of all tokens of all prompts [tokens, V], as rank 0 has them."""

    def work(group: Group) -> Tensor:
        loaded = load_part(directory, group, **settings)
        return torch.cat(Paged(loaded, len(prompts)).prefill(prompts, chunk))

    return in_ranks(size, meeting_place, work)[0]


class ThreadRank:
    """A rank of an engine as a thread of the test, in place of its process."""

    pid = os.getpid()

    def __init__(self, socket_fd: int) -> None:
        channel: Channel[Command] = Channel(socket.socket(fileno=os.dup(socket_fd)), Command)
        self._thread = threading.Thread(target=self._work, args=(channel,))
        self._thread.start()

    def _work(self, channel: Channel[Command]) -> None:
        with closing(channel):
            serve(channel)

    def poll(self) -> None:
        return None

    def kill(self) -> None:
        """Do nothing: the thread ends with its channel."""

    def wait(self, timeout: float | None = None) -> int:
        self._thread.join(timeout)
        assert not self._thread.is_alive()
        return 0
