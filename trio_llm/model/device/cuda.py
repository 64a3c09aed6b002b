"""A GPU: one stream, copies through page-locked memory, graphs, and what is left of its memory."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import attrs
import torch
from numpy.typing import NDArray
from torch import Tensor

from trio_llm.errors import ConfigError
from trio_llm.model.device.device import Mark
from trio_llm.model.device.staging import Staging


@attrs.frozen
class _Event:
    """A point in a stream."""

    event: torch.cuda.Event

    def wait(self) -> None:
        self.event.synchronize()

    def has_passed(self) -> bool:
        return self.event.query()

    def seconds_since(self, earlier: Mark) -> float:
        assert isinstance(earlier, _Event)
        return earlier.event.elapsed_time(self.event) / 1000


class Cuda:
    """The current CUDA device. All its work is in one stream, so steps queue behind each other without a wait."""

    def __init__(self) -> None:
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        self._stream = torch.cuda.Stream(self.torch_device)
        self._pool = torch.cuda.graph_pool_handle()
        self._staging = Staging(_pinned, self.torch_device, self.mark)

    @contextmanager
    def working(self) -> Generator[None]:
        with torch.cuda.stream(self._stream):
            yield

    def send(self, columns: Sequence[NDArray[Any]]) -> list[Tensor]:
        return self._staging.send(columns)

    def to_host(self, tensor: Tensor) -> Tensor:
        # torch's cache of pinned memory reuses this buffer only after the copy is done.
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    def mark(self) -> Mark:
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return _Event(event)

    def is_lost(self) -> bool:
        try:
            self._stream.synchronize()
        except Exception:  # noqa: BLE001 - whatever it is, a healthy device's stream can be waited for
            return True
        return False

    def release(self) -> None:
        self._stream.synchronize()
        torch.cuda.empty_cache()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record work into a graph; all graphs of this device share their memory.

        Sharing is safe: they are replayed in one stream, and the results of one are not read after the next begins.
        """
        graph = torch.cuda.CUDAGraph()
        with self.working():
            # thread_local: other threads, also of other libraries, may make calls that this capture forbids.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            except BaseException:
                with suppress(RuntimeError):  # "capture is invalid", which the first error explains
                    graph.capture_end()
                raise
            graph.capture_end()
        return graph.replay

    def peak_bytes(self, work: Callable[[], object]) -> int:
        """Do work; return the peak of the memory held for it, the allocator's rounding included."""
        self.release()
        torch.cuda.reset_peak_memory_stats(self.torch_device)
        before = torch.cuda.memory_reserved(self.torch_device)
        with self.working():
            work()
        self._stream.synchronize()
        peak = torch.cuda.max_memory_reserved(self.torch_device) - before
        self.release()
        return peak

    def memory(self) -> tuple[int, int]:
        """Return the free and the total bytes."""
        return torch.cuda.mem_get_info(self.torch_device)


def open_cuda(rank: int = 0, ranks: int = 1) -> Cuda:
    """Take the current CUDA device, or with several ranks the visible one with the rank's number, for this thread.

    Raises:
        ConfigError: There is none, or there are fewer than ranks.
    """
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        allowed = f"no CUDA device is available (torch {torch.__version__}, {built}); use --device cpu"
        raise ConfigError("device", "cuda", "machine", allowed)
    if ranks > 1:
        if ranks > (visible := torch.cuda.device_count()):
            allowed = f"at most {visible}, the number of GPUs that CUDA sees; --device cpu has ranks on its cores"
            raise ConfigError("tensor_parallel_size", ranks, "machine", allowed)
        torch.cuda.set_device(rank)
    return Cuda()


def _pinned(num_bytes: int) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
