"""The ranks of one model: how they divide its layers, and their collectives.

Every rank runs the same layers, each on its own heads, columns and rows. After attention and after the feed-forward
`all_reduce` adds the parts up, so all ranks have the same hidden states. Rank 0 alone needs the logits and samples.

A group is made before it is connected: a checkpoint's headers are checked without other processes.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from trio_llm.errors import ConfigError
from trio_llm.model.parallel.span import Span


class RanksError(Exception):
    """A collective failed: a rank has died, does not answer, or is not connected."""


class Group:
    """`size` ranks, of which this is `rank`. With one rank every part is the whole, and collectives return at once."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self._processes: Any = None

    def share(self, size: int) -> Span:
        """Return this rank's part of a dimension; parts are equally long, and zeros fill the last ones up."""
        length = -(-size // self.size)
        first = min(size, self.rank * length)
        return Span(size, first, min(length, size - first), length)

    def heads(self, num_heads: int, num_kv_heads: int) -> tuple[Span, Span]:
        """Return this rank's query heads and KV heads. If there are fewer KV heads than ranks, ranks share one.

        Raises:
            ConfigError: The ranks do not divide the heads.
        """
        if num_heads % self.size or (num_kv_heads % self.size and self.size % num_kv_heads):
            allowed = (
                f"does not divide {num_heads} attention heads and {num_kv_heads} KV heads: the first must be a "
                "multiple of the number of ranks, the second a multiple or a divisor of it"
            )
            raise ConfigError("tensor_parallel_size", self.size, "model", allowed)
        if num_kv_heads >= self.size:
            return self.share(num_heads), self.share(num_kv_heads)
        return self.share(num_heads), Span(num_kv_heads, self.rank * num_kv_heads // self.size, 1, 1)

    def connect(self, path: str, timeout_s: float) -> None:
        """Connect to the other ranks, on this machine.

        Args:
            path: A file that all ranks can open and lock, empty at first; they find each other through it.
            timeout_s: Seconds after which a collective fails, also this one.
        Raises:
            RanksError: A rank did not come.
        """
        # Imported here: it takes longer than the rest of loading a small model.
        import torch.distributed

        distributed: Any = torch.distributed  # torch's type stubs lack this store
        try:
            store = distributed.FileStore(path, self.size)
            store.set_timeout(timedelta(seconds=timeout_s))
            self._processes = _gloo(store, self.rank, self.size, timedelta(seconds=timeout_s))
        except RuntimeError as error:
            raise RanksError(_first_line(error)) from error

    def disconnect(self) -> None:
        """Close the connections; collectives fail from now on."""
        self._processes = None

    def all_reduce(self, x: Tensor) -> Tensor:
        """Add up x over the ranks, in place; all get the same bits."""
        if self.size > 1:
            self._wait("allreduce", [x])
        return x

    def gather(self, x: Tensor) -> Tensor:
        """Return the columns of all ranks on rank 0, [R, N * size] for x [R, N]; x on the others."""
        if self.size == 1:
            return x
        from torch.distributed.distributed_c10d import GatherOptions

        options = GatherOptions()
        options.rootRank = 0
        parts = [torch.empty_like(x) for _ in range(self.size)] if self.rank == 0 else []
        self._wait("gather", [parts] if parts else [], [x.contiguous()], options)
        return torch.cat(parts, dim=-1) if parts else x

    def broadcast(self, x: Tensor) -> None:
        """Overwrite x [*] with that of rank 0."""
        if self.size > 1:
            self._wait("broadcast", [x])

    def _wait(self, collective: str, *args: Any) -> None:
        """Do a collective. The root is rank 0, torch's default."""
        if self._processes is None:
            raise RanksError("the ranks are not connected")
        try:
            getattr(self._processes, collective)(*args).wait()
        except RuntimeError as error:
            raise RanksError(f"{collective}: {_first_line(error)}") from error


def _gloo(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    from torch.distributed.distributed_c10d import ProcessGroupGloo

    gloo: Any = ProcessGroupGloo  # torch's type stubs lack its options
    options = gloo._Options()
    options._timeout = timeout
    # Only the loopback interface: other machines must not reach the ranks' sockets.
    options._devices = [gloo.create_device(hostname="127.0.0.1")]
    return gloo(store, rank, size, options)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
