"""The ranks of one model: how they divide its layers, and their collectives.

Every rank runs the same layers, each on its own heads, columns and rows. After attention and after the feed-forward
`all_reduce` adds the parts up, so all ranks have the same hidden states. Rank 0 alone needs the logits and samples.

A group is made before it is connected: a checkpoint's headers are checked without other processes.

On CPUs a collective is done when it returns, and fails after a timeout. On GPUs it is queued, in the caller's stream or
graph, and waits there for the other ranks as long as the group is connected: see `silence`.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from cpu_kernels import library
from trio_llm.errors import ConfigError
from trio_llm.model.parallel.span import Span

# Seconds between looks whether a rank that has not come has ended.
_LOOK_S = 0.2


class RanksError(Exception):
    """A collective failed: a rank has died, does not answer, or is not connected."""


class Group:
    """`size` ranks, of which this is `rank`. With one rank every part is the whole, and collectives return at once."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self._processes: Any = None
        self._options: dict[str, Any] = {}
        self._on_gpu = False
        self._aborting: threading.Thread | None = None

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

    def connect(
        self,
        path: str,
        timeout_s: float,
        device: torch.device,
        *,
        on_gpu: bool = False,
        look: Callable[[], None] | None = None,
    ) -> None:
        """Connect to the other ranks, on this machine.

        Args:
            path: A file that all ranks can open and lock, empty at first; they find each other through it. Torch opens
                it once more when the connections are freed, whenever that is and whatever it is then.
            timeout_s: Seconds after which a collective on a CPU fails, and this call.
            device: Of the tensors of collectives.
            on_gpu: That is a GPU, of this rank alone.
            look: Called now and then until all ranks have come. It may raise.
        Raises:
            RanksError: A rank did not come.
        """
        # Imported here: it takes longer than the rest of loading a small model.
        import torch.distributed

        distributed: Any = torch.distributed  # torch's type stubs lack this store
        c10d, timeout = distributed.distributed_c10d, timedelta(seconds=timeout_s)
        self._options = {
            "allreduce": c10d.AllreduceOptions(), "broadcast": c10d.BroadcastOptions(), "gather": c10d.GatherOptions(),
        }  # fmt: skip
        for options in self._options.values():
            options.asyncOp = False  # NCCL: in the current stream
        self._on_gpu = on_gpu
        try:
            store = distributed.FileStore(path, self.size)
            store.set_timeout(timeout)
            store.set(f"rank {self.rank}", "")
            if look is not None:
                self._wait_for_all(store, timeout_s, look)
            self._processes = (_nccl if on_gpu else _gloo)(store, self.rank, self.size, timeout)
        except (RuntimeError, RanksError) as error:
            raise RanksError(_first_line(error)) from error.with_traceback(None)  # Its frames would keep the store,
        finally:
            store = None  # and so would this one.
        self.all_reduce(torch.zeros(1, device=device))  # NCCL connects in its first collective.

    def _wait_for_all(self, store: Any, timeout_s: float, look: Callable[[], None]) -> None:
        deadline_s = time.monotonic() + timeout_s
        while True:
            look()
            try:
                store.wait([f"rank {number}" for number in range(self.size)], timedelta(seconds=_LOOK_S))
                return
            except RuntimeError:
                if time.monotonic() > deadline_s:
                    raise

    def disconnect(self) -> None:
        """Close the connections; collectives fail from now on, and those that wait on a GPU end. Does not block."""
        processes, self._processes = self._processes, None
        if processes is not None and self._on_gpu:
            # NCCL tells what waits to end, then it waits itself until no captured graph is left.
            self._aborting = threading.Thread(target=_abort, args=(processes,), name="trio-llm-abort", daemon=True)
            self._aborting.start()

    def wait_disconnected(self, timeout_s: float) -> bool:
        """Wait until what the connections had is free, at most for `timeout_s`; return whether it is."""
        if self._aborting is None:
            return True
        self._aborting.join(timeout_s)
        return not self._aborting.is_alive()

    def all_reduce(self, x: Tensor) -> Tensor:
        """Add up x over the ranks, in place; all get the same bits."""
        if self.size > 1:
            library.call(lambda x: self._wait("allreduce", [x]), x)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """Return the columns of all ranks on rank 0, [R, N * size] for x [R, N]; x on the others."""
        if self.size == 1:
            return x
        x = x.contiguous()
        if self.rank:
            library.call(lambda x: self._wait("gather", [], [x]), x)
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        library.call(lambda x, *parts: self._wait("gather", [list(parts)], [x]), x, *parts)
        return torch.cat(parts, dim=-1)

    def broadcast(self, x: Tensor) -> None:
        """Overwrite x [*] with that of rank 0."""
        if self.size > 1:
            library.call(lambda x: self._wait("broadcast", [x]), x)

    def _wait(self, collective: str, *tensors: Any) -> None:
        """Do a collective, or queue it on a GPU. The root is rank 0, torch's default."""
        processes, work = self._processes, None
        if processes is None:
            raise RanksError("the ranks are not connected")
        try:
            work = getattr(processes, collective)(*tensors, self._options[collective])
            if work is not None:  # NCCL's has no work to wait for: it is in the current stream.
                work.wait()
        except RuntimeError as error:
            raise RanksError(f"{collective}: {_first_line(error)}") from error
        finally:
            del processes, work  # An exception would keep them after `disconnect`.


def _gloo(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    from torch.distributed.distributed_c10d import ProcessGroupGloo

    gloo: Any = ProcessGroupGloo  # torch's type stubs lack its options
    options = gloo._Options()
    options._timeout = timeout
    # Only the loopback interface: other machines must not reach the ranks' sockets.
    options._devices = [gloo.create_device(hostname="127.0.0.1")]
    return gloo(store, rank, size, options)


def _nccl(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    # Not imported by name: torch for CPUs has no such class.
    from torch.distributed import distributed_c10d

    # As above, for how ranks find each other; tensors go over NVLink, PCIe or shared memory. "=": this very name.
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "=lo")
    # torch's own watchdog ends the process without a word, and never sees a graph's collectives. With this it has
    # nothing to watch. What the variable is named after does not happen: the current stream is not waited for.
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"
    nccl: Any = distributed_c10d.ProcessGroupNCCL
    options = nccl.Options()
    options._timeout = timeout
    return nccl(store, rank, size, options)


def _abort(processes: Any) -> None:
    with suppress(RuntimeError):  # It took longer than the timeout, or the device is lost.
        processes.abort()


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
