"""A run in phases, each with a deadline, the report on disk after every one."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import attrs
import click

Items = Iterable[tuple[str, Callable[[], Any]]]
GRACE_S = 20.0  # after the budget, for what is under way


class Skip(Exception):  # noqa: N818 - not an error
    """Raised by an item that cannot run here, with the reason."""


@attrs.define
class Report:
    """What a run has found so far.

    Attributes:
        path: The JSON file, written whole after each phase; None keeps it in memory.
        budget_s: For all phases together; a phase that would begin later is skipped.
        clock: Seconds, monotonic.
    """

    path: Path | None
    budget_s: float
    clock: Callable[[], float] = time.monotonic
    phases: dict[str, dict[str, Any]] = attrs.field(factory=dict)
    _began: float = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._began = self.clock()

    def run(self, name: str, items: Items, limit_s: float) -> dict[str, Any]:
        """Run the named items of a phase until its deadline; an item that raises is recorded, and the rest goes on.

        Returns:
            Item name -> its result, {"failure": ...} or {"skipped": ...}.
        """
        start = self.clock()
        deadline = min(start + limit_s, self._began + self.budget_s)
        results: dict[str, Any] = {}
        for item, action in guarded(items):
            click.echo(f"{name}: {item}", err=True)  # what hangs, or kills the process, is the last line
            results[item] = {"skipped": "out of time"} if self.clock() >= deadline else run_item(action)
        self.phases[name] = {"seconds": round(self.clock() - start, 3), "limit": limit_s, "results": results}
        self.flush()
        return results

    @contextlib.contextmanager
    def bounded(self) -> Generator[None]:
        """End the process, with every thread's stack on stderr, where a kernel hangs beyond budget and grace."""
        assert sys.__stderr__ is not None
        faulthandler.dump_traceback_later(self.budget_s + GRACE_S, exit=True, file=sys.__stderr__)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()

    def flush(self) -> None:
        """Write everything so far."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.path.with_suffix(".part")
            temporary.write_text(json.dumps(without_nan(self.phases), indent=1, default=str))
            temporary.replace(self.path)

    @property
    def failed(self) -> list[str]:
        """Items that raised, as phase/item."""
        return [
            f"{phase}/{item}"
            for phase, found in self.phases.items()
            for item, result in found["results"].items()
            if isinstance(result, dict) and "failure" in result
        ]


def run_item(action: Callable[[], Any]) -> Any:
    """Run an item; what it raises is its result."""
    try:
        return action()
    except Skip as reason:
        return {"skipped": str(reason)}
    except Exception as error:  # noqa: BLE001 - one kernel's failure must not hide the others' results
        return {"failure": f"{type(error).__name__}: {error}", "trace": traceback.format_exc(limit=4)}


def guarded(items: Items) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the items; where making one fails, that is an item too, and the last."""
    iterator = iter(items)
    while True:
        try:
            item = next(iterator)
        except StopIteration:
            return
        except Exception as error:  # noqa: BLE001 - as above
            failure = error
            break
        yield item

    def fail() -> None:
        raise failure

    yield "making the next item", fail


def without_nan(found: Any) -> Any:
    """Return a report with None for NaN, which JSON does not know."""
    if isinstance(found, dict):
        return {key: without_nan(value) for key, value in found.items()}
    if isinstance(found, list | tuple):
        return [without_nan(value) for value in found]
    return None if isinstance(found, float) and math.isnan(found) else found
