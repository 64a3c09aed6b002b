"""A CUDA graph's stand-in on a CPU: what is captured is put on a tape, and a replay does exactly what is on it.

As under real capture, Python runs once; a replay makes the same calls on the same memory. What real capture refuses is
refused here: reading a device's value on the host, sizes that depend on values, and host data that comes in. Between
replays the memory of a graph belongs to others, so every replay first fills what the tape allocated with rubbish.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from cuda_kernels import launch
from cuda_kernels.launch import Dim3, Kernel, Launcher

aten = torch.ops.aten
REFUSED = {
    aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select, aten.bincount,
    aten.unique_dim, aten._unique2, aten.repeat_interleave, aten.lift_fresh, aten.multinomial,
}  # fmt: skip
REFUSED_FUNCTIONS = {
    torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.item, torch.Tensor.cpu, torch.Tensor.__bool__,
    torch.Tensor.__int__, torch.Tensor.__float__, torch.Tensor.__index__, torch.Tensor.__array__,
    torch.tensor, torch.as_tensor, torch.from_numpy,
}  # fmt: skip
RUBBISH = 0x5A5A
_capturing: ContextVar[Graph | None] = ContextVar("capturing", default=None)


class CaptureError(Exception):
    """What CUDA would refuse while it captures."""


@attrs.frozen
class Graph:
    """A tape: calls in their order, and the tensors that they allocated."""

    calls: list[Callable[[], None]] = attrs.field(factory=list)
    owned: list[Tensor] = attrs.field(factory=list)

    @torch.inference_mode()
    def replay(self) -> None:
        """Make the calls again."""
        for tensor in self.owned:
            tensor.fill_(torch.nan if tensor.is_floating_point() else RUBBISH % 127 if tensor.dtype.itemsize < 4 else 0)
        for call in self.calls:
            call()


def call(function: Callable[[], None]) -> None:
    """Call what a library queues by itself, which is in the graph that this thread captures, too."""
    if (graph := _capturing.get()) is not None:
        graph.calls.append(function)
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        function()


class _Recorder(TorchDispatchMode):
    """Puts torch's operations on a tape."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self._graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket in REFUSED:
            raise CaptureError(f"{func} during capture")
        out = func(*args, **kwargs)
        if any(returned.alias_info is not None and returned.alias_info.is_write for returned in func._schema.returns):
            self._graph.calls.append(lambda: func(*args, **kwargs))
            return out
        given = {leaf.untyped_storage().data_ptr() for leaf in _tensors((args, kwargs))}
        made = [tensor for tensor in _tensors(out) if tensor.untyped_storage().data_ptr() not in given]
        self._graph.owned.extend(made)
        if made and "empty" not in func.overloadpacket.__name__:
            self._graph.calls.append(lambda: _again(func, args, kwargs, _tensors(out)))
        return out  # a view's memory is its base's: nothing to do when replayed


def _again(func: Any, args: Any, kwargs: Any, outs: Sequence[Tensor]) -> None:
    for out, result in zip(outs, _tensors(func(*args, **kwargs)), strict=True):
        out.copy_(result)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class _HostForbidden(TorchFunctionMode):
    """Refuses what never becomes an operation: reading values, and host data coming in."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in REFUSED_FUNCTIONS:
            raise CaptureError(f"{func} during capture")
        return func(*args, **(kwargs or {}))


@attrs.frozen
class _RecordedLauncher:
    """Puts kernels on a tape and runs them."""

    inner: Launcher

    def launch(self, kernel: Kernel, grid: Dim3, block: Dim3, shared_bytes: int, args: Sequence[Any]) -> None:
        call(lambda: self.inner.launch(kernel, grid, block, shared_bytes, args))


@attrs.frozen
class Tapes:
    """Captures, and counts what is replayed."""

    graphs: list[Graph] = attrs.field(factory=list)
    num_replays: list[int] = attrs.field(factory=list)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Do what `Cuda.capture` does."""
        with launch.using(_RecordedLauncher(launch.launcher())):
            return self.capture_operations(work)

    def capture_operations(self, work: Callable[[], None]) -> Callable[[], None]:
        """Do so for work without CUDA kernels of this project, on any thread; they are launched by one for all."""
        graph = Graph()
        token = _capturing.set(graph)
        try:
            with _Recorder(graph), _HostForbidden():
                work()
        finally:
            _capturing.reset(token)
        self.graphs.append(graph)
        number = len(self.num_replays)
        self.num_replays.append(0)

        def replay() -> None:
            self.num_replays[number] += 1
            graph.replay()

        return replay
