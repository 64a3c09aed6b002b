"""What each process of `all` does: a part has phases, and a phase is a list of items.

A part is a source, with its checks and benches, or one of the rest: the machine, whole steps, the engine's tests, the
engine beside transformers, NVIDIA's tools. Only what a phase needs is imported by it: a package that is not there costs
one part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import attrs

from tools.kernel_lab import ledger, machine, tools
from tools.kernel_lab.bench import PROFILE_S, bench_items, calls_of
from tools.kernel_lab.benches import Bench, all_benches
from tools.kernel_lab.cases import MAKERS, Check, all_checks
from tools.kernel_lab.check import check_items, compile_items, primitive_items, prove, sanitizer_items
from tools.kernel_lab.device import Call, Device
from tools.kernel_lab.phases import Items

PRIMITIVES = "primitives.cu"
SOURCES = (PRIMITIVES, *MAKERS)
# In this order: time may run out, and no kernel takes float32.
ENGINE_TESTS = ("tests/gpu/test_engine_on_kernels.py", "tests/gpu/test_engine_in_float32.py")
assert set(SOURCES) == set(ledger.sources())


@attrs.frozen
class Command:
    """What a part is told to do.

    Attributes:
        seconds: Items that would begin later are left out.
        ceilings: The machine's limits, once they are known.
    """

    phase: str
    seconds: float
    ceilings: Mapping[str, float]


Say = Callable[[dict[str, Any]], None]
Phase = Callable[[Command], Items]


def phases_of(part: str, device: Device, say: Say) -> dict[str, Phase]:
    """Return a part's phases by name. `say` sends records of items that an item consists of."""
    if part in SOURCES:
        return _Source(part, device).phases
    return {
        "machine": {"machine": lambda _: [("environment", partial(machine.environment, device)), *_ceilings(device)]},
        "steps": {"steps": partial(_steps, device)},
        "engine": {"engine": partial(_engine, say)},
        "transformers": {"transformers": partial(_transformers, device)},
        "tools": {"tools": partial(_tools, device)},
    }[part]


OTHERS = ("machine", "steps", "engine", "transformers", "tools")


def _ceilings(device: Device) -> Items:
    return [(name, lambda measured=measured: {"value": measured()}) for name, measured in machine.ceilings(device)]


class _Source:
    """A kernel file's checks and benches; problems stay in memory from the first phase to the next."""

    def __init__(self, source: str, device: Device) -> None:
        self._source, self._device = source, device
        self._checks: list[Check] = []
        self._benches: list[Bench] = [one for one in all_benches(small=device.sim) if one.source == source]

    @property
    def phases(self) -> dict[str, Phase]:
        return {
            "prepare": self._prepare, "check": self._check, "time": partial(self._time, peers=False),
            "peers": partial(self._time, peers=True),
        }  # fmt: skip

    def _prepare(self, _: Command) -> Iterator[tuple[str, Call]]:
        """Make the problems, and compile what they and the benches launch."""
        self._checks = list(all_checks(self._device.torch_device, small=self._device.sim, sources={self._source}))
        yield "problems", lambda: {"made": len(self._checks)}
        yield from compile_items(self._device, (check.run for check in self._checks))
        yield from compile_items(self._device, calls_of(self._benches, self._device))

    def _check(self, _: Command) -> Items:
        if self._source == PRIMITIVES:
            return primitive_items(self._device)
        return check_items(self._checks, partial(prove, self._device))

    def _time(self, command: Command, *, peers: bool) -> Items:
        return bench_items(self._benches, self._device, command.ceilings, peers=peers)


def _steps(device: Device, command: Command) -> Items:
    from tools.kernel_lab import steps

    return steps.items(device, command.ceilings)


def _engine(say: Say, command: Command) -> Items:
    from tools.kernel_lab import engine_tests

    return [("pytest -m gpu", partial(engine_tests.run, ENGINE_TESTS, command.seconds, say))]


def _transformers(device: Device, command: Command) -> Items:
    from tools.kernel_lab import end_to_end

    return end_to_end.items(device, command.ceilings)


def _tools(device: Device, _: Command) -> Iterator[tuple[str, Call]]:
    yield from sanitizer_items(device)
    once = ["once", *(["--sim"] if device.sim else [])]
    yield "ncu", lambda: tools.profile(once, PROFILE_S)
