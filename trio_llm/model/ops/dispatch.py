"""Choose the implementation of each operation, and count the calls.

An implementation is a module of kernels for one type of device; the model loader chooses it and passes it to the
runner's `Dispatch`. Each call on that device goes to a kernel if one takes these arguments, to a vendor's library if
the module prefers that, and else to the torch reference, which is logged once and counted, never silent.
Without an implementation the reference runs and nothing is counted. The environment variable TRIO_LLM_KERNELS is auto
(as above), native on a CPU or cuda on a GPU (a call that no kernel takes is an error), or reference.

Each runner has a `Dispatch` and enters it by `dispatching` around operations, so that engines of one process do not
mix. Calls are counted when Python makes them. A CUDA graph is captured from one round of calls and replayed without
any: capture it under a fresh `Dispatch`, and `add` what that counted to the runner's at each replay, so that a call
counts each time its kernels run.
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

Mode = Literal["auto", "native", "cuda", "reference"]

_log = logging.getLogger(__name__)
_logged: set[tuple[str, str]] = set()  # operations and reasons


@attrs.define(eq=False)
class Dispatch:
    """How one runner's operations are dispatched.

    Attributes:
        mode: As in TRIO_LLM_KERNELS.
        kernels: The module of kernels: its NAME, `prepare(report)`, its operations, WHY_NOT (operation -> a function
            that returns why it cannot take these arguments, or None) and LIBRARIES (reason -> the library that it calls
            instead). An operation missing from WHY_NOT runs on the reference and is not counted.
        device_type: The device type of the tensors that the kernels take.
        calls: (operation, implementation, reason) -> calls since the last `take`. Implementations are the kernels'
            name, a library's and reference; the reason is why the kernel was not called, "" if it was.
    """

    mode: Mode = "auto"
    kernels: ModuleType | None = None
    device_type: str = "cuda"
    calls: Counter[tuple[str, str, str]] = attrs.field(factory=Counter[tuple[str, str, str]])
    _replayed: tuple[KernelCall, ...] = ()

    def fresh(self) -> Dispatch:
        """Return the same Dispatch without counts."""
        return Dispatch(self.mode, self.kernels, self.device_type)

    def add(self, replayed: tuple[KernelCall, ...]) -> None:
        """Count the calls of a captured graph once more. Nothing is done for each of them: that is done every step."""
        self._replayed += replayed

    def take(self) -> tuple[KernelCall, ...] | None:
        """Return the calls since the last `take`; None if there are none. A graph's are apart from those of Python."""
        taken = self._replayed + tuple([(*call, count) for call, count in self.calls.items()])
        self._replayed = ()
        self.calls.clear()
        return taken or None


_current: ContextVar[Dispatch] = ContextVar("dispatch")


def mode_from_environment() -> Mode:
    """Read TRIO_LLM_KERNELS.

    Raises:
        ConfigError: It is none of the modes.
    """
    mode = os.environ.get("TRIO_LLM_KERNELS", "auto")
    if mode not in get_args(Mode):
        raise ConfigError("TRIO_LLM_KERNELS", mode, "environment", f"one of {', '.join(get_args(Mode))}")
    return cast("Mode", mode)


@contextlib.contextmanager
def dispatching(dispatch: Dispatch) -> Generator[Dispatch]:
    """Use `dispatch` for the calls of this thread inside the block."""
    token = _current.set(dispatch)
    try:
        yield dispatch
    finally:
        _current.reset(token)


def choose(op: str, x: Tensor, *args: Any) -> ModuleType | None:
    """Return the module of kernels that takes this call, None for the reference.

    Args:
        x, args: Arguments of the module's `WHY_NOT[op]`.
    Raises:
        UnsupportedError: The mode is the kernels' name and this call would fall back.
    """
    found = _kernels_for(op, x)
    if found is None:
        return None
    dispatch, kernels = found
    if dispatch.mode == "reference":
        dispatch.calls[op, "reference", "TRIO_LLM_KERNELS"] += 1
        return None
    reason = kernels.WHY_NOT[op](x, *args)
    if reason is None or reason in kernels.LIBRARIES:
        dispatch.calls[op, kernels.NAME if reason is None else kernels.LIBRARIES[reason], reason or ""] += 1
        return kernels
    if dispatch.mode == kernels.NAME:
        raise UnsupportedError(f"TRIO_LLM_KERNELS={dispatch.mode}: no kernel does {op} with {reason}")
    dispatch.calls[op, "reference", reason] += 1
    if (op, reason) not in _logged:
        _logged.add((op, reason))
        _log.warning("no kernel does %s with %s: the torch reference runs", op, reason)
    return None


def choose_fused(op: str, x: Tensor, *args: Any) -> ModuleType | None:
    """Return the module of kernels if one does several operations at once; else they are done one by one.

    That is no fallback: nothing is logged or counted.
    """
    found = _kernels_for(op, x)
    if found is None:
        return None
    dispatch, kernels = found
    if dispatch.mode == "reference" or kernels.WHY_NOT[op](x, *args) is not None:
        return None
    dispatch.calls[op, kernels.NAME, ""] += 1
    return kernels


def _kernels_for(op: str, x: Tensor) -> tuple[Dispatch, ModuleType] | None:
    """Return this thread's dispatch and its kernels, if they have the operation on x's device."""
    dispatch = _current.get(None)
    if dispatch is None or dispatch.kernels is None or x.device.type != dispatch.device_type:
        return None
    return (dispatch, dispatch.kernels) if op in dispatch.kernels.WHY_NOT else None
