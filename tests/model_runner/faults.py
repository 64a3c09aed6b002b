"""Exceptions at chosen lines of code, and copies and pictures of a runner to compare what they leave behind."""

from __future__ import annotations

import contextvars
import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import attrs
import numpy as np
import pytest
import torch

import trio_llm
from trio_llm.grammar import Matcher
from trio_llm.messages import Admission, SamplingParams
from trio_llm.model.ops.logit_edits import TokenHistory
from trio_llm.model.runner import Runner

T = TypeVar("T")
_OURS = str(Path(trio_llm.__file__).parent)
Line = tuple[str, int]


class InjectedError(Exception):
    """What `failing_at` raises."""


@contextmanager
def _tracing(at_line: Callable[[Line], None]) -> Iterator[None]:
    """Call a function before each line of the package that this thread runs."""

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if not frame.f_code.co_filename.startswith(_OURS):
            return None
        if event == "line":
            at_line((frame.f_code.co_filename, frame.f_lineno))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def lines_of(call: Callable[[], object]) -> list[Line]:
    """Return every line that a call runs, in order, a line again each time that it runs."""
    lines: list[Line] = []
    with _tracing(lines.append):
        call()
    return lines


def first_places(lines: list[Line]) -> dict[Line, int]:
    """Return where each different line runs for the first time.

    Not later ones: a `with` runs its line again when it ends, and an exception there would keep a lock for ever.
    """
    return {line: at for at, line in reversed(list(enumerate(lines)))}


def failing_at(index: int, call: Callable[[], T]) -> T:
    """Make a call whose `index`-th line raises instead of running.

    It has context variables of its own: one that was set on the line before is not reset, as no `try` has begun.
    """
    count = -1

    def at_line(line: Line) -> None:
        nonlocal count
        count += 1
        if count == index:
            raise InjectedError(f"{Path(line[0]).name}:{line[1]}")

    with _tracing(at_line):
        return contextvars.copy_context().run(call)


def copy_of(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> Runner:
    """Return a runner of the same model that stands where this one stands, and shares nothing that a step changes."""
    monkeypatch.setattr(Matcher, "__deepcopy__", _copy_matcher, raising=False)
    for kind in (Admission, SamplingParams):
        monkeypatch.setattr(kind, "__deepcopy__", lambda self, _: self, raising=False)
    shared: list[object] = [runner._model, runner._device, runner._layout, runner.info, runner._dispatch.kernels]
    if runner._drafter is not None:
        shared.append(runner._drafter._draft)
    return copy.deepcopy(runner, {id(one): one for one in shared})


def _copy_matcher(matcher: Matcher, _: object) -> Matcher:
    duplicate = Matcher(matcher._matcher.deep_copy(), 0)
    duplicate._mask_bytes = matcher._mask_bytes
    return duplicate


def picture(value: Any) -> Any:
    """Return all that a runner holds of its sequences as plain values, so that == compares it to the bit."""
    match value:
        case torch.Tensor():
            return picture(value.contiguous().view(torch.uint8).numpy()) if value.numel() else None
        case np.ndarray():
            return value.shape, value.tobytes()
        case dict():
            return {key: picture(one) for key, one in value.items()}
        case set():
            return sorted(value)
        case list() | tuple():
            return [picture(one) for one in value]
        case Matcher():
            return value._matcher.deep_copy().compute_bitmask()
        case TokenHistory():  # its arrays have room for more, which holds anything
            return value.output, value.ids.tolist(), value.counts.tolist()
        case Admission() | SamplingParams():
            return value
        case _ if attrs.has(type(value)):
            names = attrs.fields_dict(type(value)).keys() - _NOT_STATE
            return {name: picture(getattr(value, name)) for name in names}
        case _ if hasattr(value, "__dict__") and type(value).__module__.startswith("trio_llm."):
            return {name: picture(one) for name, one in vars(value).items() if name not in _NOT_STATE}
        case _:
            return value


# What a step never changes, and where time stands.
_NOT_STATE = {"info", "budget", "_model", "_device", "_layout", "_draft", "_logits", "_send", "_fresh_seed", "done"}


def difference(one: Any, other: Any, path: str = "") -> str | None:
    """Return where two pictures differ, None if nowhere; pytest's own comparison takes minutes for these."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        parts = [(f"{path}.{key}", one[key], other[key]) for key in one]
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        parts = [(f"{path}[{i}]", *pair) for i, pair in enumerate(zip(one, other, strict=True))]
    else:
        return None if one == other else f"{path}: {str(one)[:100]} != {str(other)[:100]}"
    return next(filter(None, (difference(left, right, name) for name, left, right in parts)), None)
