"""Which implementation an operation runs on, and the account of it.

On a CPU the torch reference runs and nothing is counted. On a GPU each call goes to a CUDA kernel where one takes these
arguments, to cuBLAS where that is the faster choice, and else the reference runs there too: said once in the log and
counted, never silent. The environment's TRIO_LLM_KERNELS decides: auto (that), cuda (what neither a kernel nor cuBLAS
takes is an error) or reference.

A runner holds a `Dispatch` of its own, entered by `dispatching` around whatever calls operations, so that engines of
one process do not mix. Calls are counted when Python makes them. A CUDA graph is made by one round of calls and
replayed without any: capture it under a `Dispatch` of its own and `add` that to the runner's with each replay, so that
a call counts each time its kernels run.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections import Counter
from collections.abc import Generator
from contextvars import ContextVar
from types import ModuleType
from typing import Any, Literal, cast, get_args

import attrs
from torch import Tensor

from trio_llm.errors import ConfigError, UnsupportedError
from trio_llm.messages import KernelCall

Mode = Literal["auto", "cuda", "reference"]

_log = logging.getLogger(__name__)
_said: set[tuple[str, str]] = set()  # operations and reasons that the log has


@attrs.define(eq=False)
class Dispatch:
    """How one runner's operations are dispatched.

    Attributes:
        mode: As in TRIO_LLM_KERNELS.
        calls: (operation, implementation, reason) -> calls on a GPU since the last `take`. Implementations are cuda
            (a kernel of this project), cublas and reference; the reason is why it is not the kernel, "" where it is.
    """

    mode: Mode = "auto"
    calls: Counter[tuple[str, str, str]] = attrs.field(factory=Counter[tuple[str, str, str]])

    @classmethod
    def from_environment(cls) -> Dispatch:
        """Read TRIO_LLM_KERNELS.

        Raises:
            ConfigError: It is none of the modes.
        """
        mode = os.environ.get("TRIO_LLM_KERNELS", "auto")
        if mode not in get_args(Mode):
            raise ConfigError("TRIO_LLM_KERNELS", mode, "environment", f"one of {', '.join(get_args(Mode))}")
        return cls(cast("Mode", mode))

    def add(self, replayed: Dispatch) -> None:
        """Count the calls of a captured graph once more."""
        self.calls.update(replayed.calls)

    def take(self) -> tuple[KernelCall, ...] | None:
        """Return what was called since the last time; None for nothing."""
        taken = tuple((*call, count) for call, count in self.calls.items())
        self.calls.clear()
        return taken or None


_current: ContextVar[Dispatch] = ContextVar("dispatch")


@contextlib.contextmanager
def dispatching(dispatch: Dispatch) -> Generator[Dispatch]:
    """Dispatch what this thread calls inside the block by `dispatch`, which it hands on."""
    token = _current.set(dispatch)
    try:
        yield dispatch
    finally:
        _current.reset(token)


def choose(op: str, x: Tensor, *args: Any) -> ModuleType | None:
    """Return the module of kernels (ops_cuda) where it takes this call, None where the reference is to run.

    Args:
        x, args: What `ops_cuda.WHY_NOT[op]` looks at.
    Raises:
        UnsupportedError: The mode is cuda and this call would fall back.
    """
    if not _on_gpu(x):
        return None
    dispatch = _current.get(None) or Dispatch()
    if dispatch.mode == "reference":
        dispatch.calls[op, "reference", "TRIO_LLM_KERNELS"] += 1
        return None
    from trio_llm.model import ops_cuda

    reason = ops_cuda.WHY_NOT[op](x, *args)
    if reason is None or reason == ops_cuda.FOR_CUBLAS:
        dispatch.calls[op, "cuda" if reason is None else "cublas", reason or ""] += 1
        return ops_cuda
    if dispatch.mode == "cuda":
        raise UnsupportedError(f"TRIO_LLM_KERNELS=cuda: no kernel does {op} with {reason}")
    dispatch.calls[op, "reference", reason] += 1
    if (op, reason) not in _said:
        _said.add((op, reason))
        _log.warning("no kernel does %s with %s: the torch reference runs", op, reason)
    return None


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda
